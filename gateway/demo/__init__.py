"""Two real models that come with the package, in Triton's layout, and a sample request for each.

`models/` is a model repository as `gateway serve` takes it; `samples/<model>.json` holds one OIP request body
and the answer the model gives to it; `samples/held_out.json` holds the digits no model was trained on.
`train.py` rewrites them all.
"""
