"""MLServer: the V2 inference protocol with the image as a BYTES tensor, parallel workers and adaptive batching."""

from __future__ import annotations

import orjson
from mlserver import MLModel
from mlserver.codecs import Base64Codec, StringCodec
from mlserver.types import InferenceRequest, InferenceResponse

from tests.benchmark.peers import common


class Classifier(MLModel):
    async def load(self) -> bool:
        common.session()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        images = Base64Codec.decode_input(payload.inputs[0])
        replies = [orjson.dumps(reply).decode() for reply in common.classify(images)]
        return InferenceResponse(model_name=self.name, outputs=[StringCodec.encode_output("reply", replies)])
