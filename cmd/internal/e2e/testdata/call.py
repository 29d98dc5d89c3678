# Calls the targets of its command line through gRPC's own xDS client. For each
# line of standard input, "TARGET N SECONDS", it makes N calls, each with so much
# time, and prints how many each instance answered, or the code of the first call
# that failed.
import collections
import sys

import grpc

calls = {}
for target in sys.argv[1:]:
    channel = grpc.insecure_channel("xds:///" + target)
    calls[target] = channel.unary_unary("/e2e.Who/Is")
for line in sys.stdin:
    target, n, seconds = line.split()
    answered = collections.Counter()
    try:
        for _ in range(int(n)):
            answered[calls[target](b"", timeout=float(seconds)).decode()] += 1
        print(" ".join(f"{who}={n}" for who, n in sorted(answered.items())), flush=True)
    except grpc.RpcError as e:
        print(e.code().name, flush=True)
