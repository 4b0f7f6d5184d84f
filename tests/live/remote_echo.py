"""Echo models for other makers' servers, each with INPUT0 → OUTPUT0: run by their own Python, not by the tests'."""

MLSERVER = """
from mlserver import MLModel
from mlserver.types import InferenceResponse, ResponseOutput


class Echo(MLModel):
    async def load(self):
        return True

    async def predict(self, payload):
        (given,) = payload.inputs
        output = ResponseOutput(
            name="OUTPUT0", datatype=given.datatype, shape=given.shape, data=given.data, parameters=given.parameters
        )
        return InferenceResponse(model_name=self.name, outputs=[output])
"""

KSERVE = """
import sys

from kserve import InferOutput, InferResponse, Model, ModelServer


class Echo(Model):
    def load(self):
        self.ready = True
        return True

    async def get_input_types(self):
        return [{"name": "INPUT0", "datatype": self.name.removeprefix("id_").upper(), "shape": [-1, 3]}]

    async def get_output_types(self):
        return [{"name": "OUTPUT0", "datatype": self.name.removeprefix("id_").upper(), "shape": [-1, 3]}]

    async def predict(self, payload, headers=None, response_headers=None):
        (given,) = payload.inputs
        output = InferOutput("OUTPUT0", given.shape, given.datatype)
        output.set_data_from_numpy(given.as_numpy(), binary_data=False)
        return InferResponse(payload.id, self.name, [output])


models = [Echo(name) for name in sys.argv[3:]]
for model in models:
    model.load()
ModelServer(http_port=int(sys.argv[1]), grpc_port=int(sys.argv[2]), workers=1).start(models)
"""
