"""What the showcase's monitoring page does with the two tables, run in MLServer's own environment by tests.

Reads JSON rows [raw_request, raw_response] from stdin, as psycopg2 gives JSONB, decodes them with MLServer's codecs and
prints one JSON list per request: its columns, and the outputs' values.
"""

import json
import sys

from mlserver.codecs import NumpyCodec, PandasCodec  # type: ignore[import-not-found]
from mlserver.types import InferenceRequest, InferenceResponse  # type: ignore[import-not-found]

for raw_request, raw_response in json.load(sys.stdin):
    request = InferenceRequest.model_validate(raw_request)
    response = InferenceResponse.model_validate(raw_response)
    frame = PandasCodec.decode_request(request)
    outputs = {output.name: NumpyCodec.decode_output(output).tolist() for output in response.outputs}
    sys.stdout.write(json.dumps([request.id, frame.to_dict("list"), response.model_version, outputs]) + "\n")
