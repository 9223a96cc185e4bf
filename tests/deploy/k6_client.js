// grpc-go under load: reflection, unary calls with their errors, and a stream to its end.
// With CA and TOKEN in the environment over TLS.
import { check } from "k6";
import grpc from "k6/net/grpc";

export const options = {
  scenarios: {
    calls: { executor: "per-vu-iterations", vus: 4, iterations: 25, exec: "calls" },
    stream: { executor: "per-vu-iterations", vus: 2, iterations: 1, exec: "stream" },
  },
  thresholds: { checks: ["rate==1.0"], grpc_req_duration: ["p(95)<5000"] },
};

const client = new grpc.Client();
const bearer = __ENV.CA ? { authorization: `Bearer ${__ENV.TOKEN}` } : {};
const security = __ENV.CA ? { tls: { cacerts: open(__ENV.CA) }, reflectMetadata: bearer } : { plaintext: true };
const connection = { reflect: true, timeout: "30s", ...security };
const params = { metadata: bearer };

export function calls() {
  client.connect(__ENV.ADDRESS, connection);
  const found = client.invoke("espalier.v1.RunService/GetRun", { id: __ENV.RUN }, params);
  check(found, {
    "the run is found": (answer) => answer.status === grpc.StatusOK && answer.message.run.id === __ENV.RUN,
  });
  const missing = client.invoke("espalier.v1.RunService/GetRun", { id: "run-000000000000" }, params);
  check(missing, { "one that is not there is not found": (answer) => answer.status === grpc.StatusNotFound });
  const request = { spec: { model: "/etc" }, validate_only: true };
  const wrong = client.invoke("espalier.v1.RunService/CreateRun", request, params);
  check(wrong, { "a wrong run is refused": (answer) => answer.status === grpc.StatusInvalidArgument });
  client.close();
}

export function stream() {
  client.connect(__ENV.ADDRESS, connection);
  const events = new grpc.Stream(client, "espalier.v1.RunService/WatchRun", params);
  let last = 0;
  let inOrder = true;
  events.on("data", (message) => {
    inOrder = inOrder && Number(message.event.revision) === last + 1;
    last += 1;
  });
  events.on("end", () => {
    check(last, { "every event came once and in order": () => inOrder && last === Number(__ENV.EVENTS) });
    client.close();
  });
  events.write({ id: __ENV.RUN });
  events.end();
}
