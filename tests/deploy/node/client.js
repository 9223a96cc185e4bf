// Creates a run, follows it to its end, and asks for one that is not there. Prints what it has seen as JSON.
// With CA and TOKEN in the environment it does so over TLS.
const fs = require("node:fs");
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");

const [address, schema, model, text] = process.argv.slice(2);
const definition = loader.loadSync("espalier/v1/run_service.proto", {
  includeDirs: [schema],
  keepCase: true,
  longs: Number,
  enums: String,
});
const { espalier } = grpc.loadPackageDefinition(definition);

function credentials() {
  if (!process.env.CA) return grpc.credentials.createInsecure();
  const bearer = grpc.credentials.createFromMetadataGenerator((_, done) => {
    const metadata = new grpc.Metadata();
    metadata.set("authorization", `Bearer ${process.env.TOKEN}`);
    done(null, metadata);
  });
  const tls = grpc.credentials.createSsl(fs.readFileSync(process.env.CA));
  return grpc.credentials.combineChannelCredentials(tls, bearer);
}

const client = new espalier.v1.RunService(address, credentials());
const deadline = () => ({ deadline: Date.now() + 60000 });
const call = (method, request) =>
  new Promise((resolve, reject) =>
    client[method](request, deadline(), (error, answer) => (error ? reject(error) : resolve(answer))),
  );

async function main() {
  const spec = { model, training_data: [{ path: text }], tp_degree: 1, recipe: { steps: 6 } };
  const { run } = await call("CreateRun", { spec, request_id: "from node" });
  const revisions = [];
  await new Promise((resolve, reject) => {
    const events = client.WatchRun({ id: run.id });
    events.on("data", (message) => revisions.push(message.event.revision));
    events.on("error", reject);
    events.on("end", resolve);
  });
  const ended = (await call("GetRun", { id: run.id })).run;
  let missing = null;
  try {
    await call("GetRun", { id: "run-000000000000" });
  } catch (error) {
    missing = { code: error.code, details: error.details, has_details: error.metadata.get("grpc-status-details-bin").length };
  }
  console.log(JSON.stringify({ state: ended.state, revisions, missing }));
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
