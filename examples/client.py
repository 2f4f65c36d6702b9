import grpc

from lorry.v1 import generation_pb2 as pb
from lorry.v1 import generation_pb2_grpc as services

with grpc.insecure_channel("localhost:50051") as channel:
    spec = pb.GenerationSpec(adapters=[pb.AdapterRef(id="pirate")], sampling=pb.SamplingParams(temperature=0))
    spec.chat.messages.add(role="user", content="Where do penguins live?")
    stub = services.GenerationServiceStub(channel)
    for event in stub.GenerateStream(pb.GenerateStreamRequest(spec=spec)):
        print(event.delta.text, end="", flush=True)
