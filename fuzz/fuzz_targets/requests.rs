//! The decoder of every request of every service. The first byte picks one.

#![no_main]

use libfuzzer_sys::fuzz_target;
use prost::Message;
use prost_reflect::{DescriptorPool, DynamicMessage, MessageDescriptor};
use std::collections::BTreeMap;
use std::sync::LazyLock;
use wire::pb;

type Recode = fn(&[u8]) -> Option<Vec<u8>>;

fn recode<M: Message + Default>(bytes: &[u8]) -> Option<Vec<u8>> {
    M::decode(bytes).ok().map(|message| message.encode_to_vec())
}

macro_rules! requests {
    ($($name:ident)*) => { [$((stringify!($name), recode::<pb::$name> as Recode)),*] };
}

static REQUESTS: LazyLock<Vec<(MessageDescriptor, Recode)>> = LazyLock::new(|| {
    let recoders = BTreeMap::from(requests!(
        AbortRequest ApplyMaskRequest CancelRunRequest CheckpointRequest CreateRunRequest DeleteRunRequest
        DeregisterRequest DescribeRequest DownloadArtifactRequest DrainWorkerRequest EvaluateRequest
        EvaluateRunRequest EvaluateTaskRequest ExportRequest ExportRunRequest ForkRunRequest GetKeepMaskRequest
        GetRunRequest JoinGroupRequest ListArtifactsRequest ListDecisionsRequest ListRunsRequest
        ListWorkersRequest LoadRequest OpenRendezvousRequest PauseRunRequest QueryWhatIfRequest RegisterRequest
        RenewRequest ResumeRunRequest TrainRequest WatchImportanceRequest WatchRunRequest
    ));
    let schema = DescriptorPool::decode(pb::DESCRIPTORS).expect("the schema decodes");
    let services: Vec<_> = schema.services().collect();
    let methods = services.iter().flat_map(|service| service.methods());
    let inputs: BTreeMap<String, MessageDescriptor> =
        methods.map(|method| (method.input().name().to_owned(), method.input())).collect();
    assert_eq!(inputs.len(), recoders.len(), "every request of the schema is in the list above");
    inputs
        .into_iter()
        .map(|(name, descriptor)| {
            let recoder = recoders.get(name.as_str()).unwrap_or_else(|| panic!("{name} is not listed"));
            (descriptor, *recoder)
        })
        .collect()
});

fuzz_target!(|data: &[u8]| {
    let Some((choice, bytes)) = data.split_first() else { return };
    let (descriptor, recode) = &REQUESTS[usize::from(*choice) % REQUESTS.len()];
    if let Some(once) = recode(bytes) {
        assert_eq!(recode(&once).as_ref(), Some(&once), "a second trip changes nothing");
        DynamicMessage::decode(descriptor.clone(), once.as_slice()).expect("both decoders read it");
    }
});
