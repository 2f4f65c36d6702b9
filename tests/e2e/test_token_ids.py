"""A model without a tokenizer, its weights random: token ids are served, text is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from lorry.v1 import generation_pb2, generation_pb2_grpc

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 331,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": 2,
}


def test_token_ids_go_in_and_come_out(tmp_path: Path, live_server: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    options = ["--load-format", "dummy", "--kv-memory", "4MiB", "--threads", "1"]
    with live_server(tmp_path, options) as server:
        generation = server.stub(generation_pb2_grpc.GenerationServiceStub)
        ids = generation_pb2.TokenIds(ids=[5, 17, 201])

        def generate(**fields: Any) -> Any:
            fields.setdefault("stopping", generation_pb2.StoppingCriteria(max_new_tokens=7, ignore_eos=True))
            return generation.Generate(generation_pb2.GenerateRequest(spec=generation_pb2.GenerationSpec(**fields)))

        answer = generate(token_ids=ids)
        assert len(answer.completions[0].token_ids) == 7 and answer.completions[0].text == ""
        refused = {
            "spec.text": lambda: generate(text="Hello"),
            "spec.response.include_prompt": lambda: generate(
                token_ids=ids, response=generation_pb2.ResponseOptions(include_prompt=True)
            ),
            "spec.stopping.stop": lambda: generate(token_ids=ids, stopping=generation_pb2.StoppingCriteria(stop=["."])),
            "text": lambda: generation.Tokenize(generation_pb2.TokenizeRequest(text="Hello")),
            "token_ids": lambda: generation.Detokenize(generation_pb2.DetokenizeRequest(token_ids=[4])),
        }
        for field, call in refused.items():
            with pytest.raises(grpc.RpcError) as caught:
                call()
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, field
            assert "has no tokenizer" in caught.value.details(), field
            named = error_details_pb2.BadRequest()
            assert any(packed.Unpack(named) for packed in rpc_status.from_call(caught.value).details)
            assert [violation.field for violation in named.field_violations] == [field]
