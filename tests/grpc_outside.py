"""Uses the gRPC ports with a foreign client that has no .proto file, by reflection.

    grpc_outside.py CLUSTER_JSON      of a `dkc dev` with one shard

Lists the services of every process (by both versions of reflection, since grpcurl may use either), checks its health,
and reads a counter from a storage node with messages that are built from the node's own descriptors. Python's gRPC is
another implementation than that of dkc: anything that only dkc's client understands fails here.
"""

import base64
import json
import sys
import threading
import urllib.parse
import urllib.request

import grpc
from google.protobuf import descriptor_pool, message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

OWN = {
    "storage-node": ["dkc.v1.Control", "dkc.v1.Gateway", "dkc.v1.Peer"],
    "coordinator": ["dkc.v1.Operator", "dkc.v1.Reports"],
    "gateway": [],
}
LIMIT = 10  # seconds, for every call


def main(cluster_json):
    with open(cluster_json) as file:
        processes = json.load(file)["processes"]
    by_role = {process["role"]: process for process in processes}
    for role, own in OWN.items():
        with grpc.insecure_channel(by_role[role]["addresses"]["grpc"]) as channel:
            check_services(channel, role, own)
            check_health(channel, role, own)
    node = by_role["storage-node"]
    cluster = cluster_uuid(by_role["etcd"], node)
    with grpc.insecure_channel(node["addresses"]["grpc"]) as channel:
        check_read(channel, by_role["gateway"], cluster)
        check_newer_version(channel, cluster)


def check(what, got, want):
    if got != want:
        sys.exit(f"FAILED {what}: {got!r} instead of {want!r}")
    print(f"ok {what}")


def listed(channel, version):
    """The request of `grpcurl list`. The messages of both versions have the same bytes."""
    ask = channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    question = reflection_pb2.ServerReflectionRequest(list_services="")
    answer = next(ask(iter([question]), timeout=LIMIT))
    return sorted(service.name for service in answer.list_services_response.service)


def check_services(channel, role, own):
    for version in ["v1", "v1alpha"]:
        common = ["grpc.health.v1.Health", f"grpc.reflection.{version}.ServerReflection"]
        check(f"{role}: services by {version}", listed(channel, version), sorted(own + common))


def check_health(channel, role, own):
    health = health_pb2_grpc.HealthStub(channel)
    for service in ["", *own]:
        answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=LIMIT)
        name = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
        check(f"{role}: health of {service or 'the process'}", name, "SERVING")
    watch = health.Watch(health_pb2.HealthCheckRequest(service=""), timeout=LIMIT)
    check(f"{role}: health as a stream", next(watch).status, health_pb2.HealthCheckResponse.SERVING)
    watch.cancel()


def cluster_uuid(etcd, node):
    """The record `meta`: a format byte, then the uuid, little-endian."""
    name = node["argv"][node["argv"].index("--cluster") + 1]
    key = base64.b64encode(f"/dkc/{name}/meta".encode()).decode()
    url = f"http://{etcd['addresses']['http']}/v3/kv/range"
    request = urllib.request.Request(url, json.dumps({"key": key}).encode())
    with urllib.request.urlopen(request, timeout=LIMIT) as answer:
        value = base64.b64decode(json.load(answer)["kvs"][0]["value"])
    return int.from_bytes(value[1:17], "little")


class Stranger:
    """Builds messages from the descriptors of the node."""

    def __init__(self, channel):
        self.channel = channel
        self.pool = descriptor_pool.DescriptorPool(ProtoReflectionDescriptorDatabase(channel))

    def message(self, name, **fields):
        return message_factory.GetMessageClass(self.pool.FindMessageTypeByName(f"dkc.v1.{name}"))(**fields)

    def open(self, cluster, version):
        high, low = cluster >> 64, cluster & (2**64 - 1)
        return self.message("Open", version=version, cluster_high=high, cluster_low=low)

    def session(self, messages):
        method = self.pool.FindServiceByName("dkc.v1.Gateway").methods_by_name["Session"]
        call = self.channel.stream_stream(
            f"/{method.containing_service.full_name}/{method.name}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=message_factory.GetMessageClass(method.output_type).FromString,
        )
        return call(messages, timeout=LIMIT)


def check_read(channel, gateway, cluster):
    url = f"http://{gateway['addresses']['http']}/v1/counters/outside/ключ/increment?delta=-300"
    url = urllib.parse.quote(url, safe=":/?=")
    with urllib.request.urlopen(urllib.request.Request(url, method="POST"), timeout=LIMIT) as answer:
        check("an increment over HTTP", json.load(answer)["applied"], -300)

    stranger = Stranger(channel)
    names = [b"outside\0" + "ключ".encode(), b"outside\0never touched"]
    read = stranger.message("Read", id=7, slots=stranger.message("Slots", lo=0, hi=65535), names=names)
    opening = stranger.message("ToNode", open=stranger.open(cluster, 1))
    answered = threading.Event()

    def messages():
        yield opening
        yield stranger.message("ToNode", read=read)
        # A session ends for both sides when the client closes its stream; requests without a response then get none.
        answered.wait(LIMIT)

    replies = stranger.session(messages())
    each = (reply for message in replies for reply in message.replies)
    reply = next(reply.read for reply in each if reply.WhichOneof("kind") == "read")
    answered.set()
    check("the number of the read", reply.id, 7)
    check("a read is answered with values", reply.WhichOneof("kind"), "values")
    check("the values", varints(reply.values.values), [-300, 0])


def varints(data):
    """Zigzag LEB128."""
    values, value, shift = [], 0, 0
    for byte in data:
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            values.append(value >> 1 ^ -(value & 1))
            value, shift = 0, 0
    return values


def check_newer_version(channel, cluster):
    stranger = Stranger(channel)
    opening = stranger.message("ToNode", open=stranger.open(cluster, 2))
    try:
        next(stranger.session(iter([opening])))
        sys.exit("FAILED a newer message version was not refused")
    except grpc.RpcError as error:
        check("a newer message version", error.code(), grpc.StatusCode.FAILED_PRECONDITION)
        check("is named", "uses message version 2" in error.details(), True)


main(*sys.argv[1:])
