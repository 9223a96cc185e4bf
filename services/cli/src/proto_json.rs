//! Messages as JSON by the schema: the canonical mapping with the proto's field names and plain 64-bit numbers.

use anyhow::Context;
use prost::Message;
use prost_reflect::{DescriptorPool, DynamicMessage, MessageDescriptor, SerializeOptions};
use serde_json::Value;
use std::sync::LazyLock;
use wire::pb;

static POOL: LazyLock<Result<DescriptorPool, String>> =
    LazyLock::new(|| DescriptorPool::decode(pb::DESCRIPTORS).map_err(|error| error.to_string()));

/// A message whose name in the schema is known here.
pub(crate) trait Named: Message + Default {
    const NAME: &'static str;
}

macro_rules! named {
    ($($message:ident),+ $(,)?) => {
        $(impl Named for pb::$message { const NAME: &'static str = concat!("espalier.v1.", stringify!($message)); })+
    };
}

named!(
    CreateRunResponse,
    Evaluation,
    EvaluateRunResponse,
    ExportRunResponse,
    GetKeepMaskResponse,
    GetRunResponse,
    ListArtifactsResponse,
    ListDecisionsResponse,
    ListRunsResponse,
    ListWorkersResponse,
    QueryWhatIfResponse,
    Run,
    RunEvent,
    RunSpec,
    TaskResult,
    WatchImportanceResponse,
    Worker,
);

/// # Errors
/// Only when the schema built into this program is broken.
pub(crate) fn to_json<M: Named>(message: &M) -> anyhow::Result<Value> {
    let mut dynamic = DynamicMessage::new(descriptor::<M>()?);
    dynamic.transcode_from(message).context("failed to read a message by its schema")?;
    let options = SerializeOptions::new()
        .stringify_64_bit_integers(false)
        .use_proto_field_name(true)
        .skip_default_fields(false);
    dynamic
        .serialize_with_options(serde_json::value::Serializer, &options)
        .context("failed to write a message as JSON")
}

/// # Errors
/// When `value` is no JSON form of the message.
pub(crate) fn from_json<M: Named>(value: &Value) -> anyhow::Result<M> {
    let dynamic = DynamicMessage::deserialize(descriptor::<M>()?, value)
        .with_context(|| format!("this is no JSON form of `{}`", M::NAME))?;
    dynamic.transcode_to().context("failed to read a message by its schema")
}

fn descriptor<M: Named>() -> anyhow::Result<MessageDescriptor> {
    let pool = POOL.as_ref().map_err(|error| anyhow::anyhow!("the schema does not decode: {error}"))?;
    pool.get_message_by_name(M::NAME).with_context(|| format!("the schema has no message `{}`", M::NAME))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_survives_the_way_to_json_and_back() {
        let report = pb::StepReport {
            step: 7,
            loss: 3.25,
            memory_bytes: u64::MAX - 1,
            duration: Some(prost_types::Duration { seconds: 1, nanos: 500_000_000 }),
            ..Default::default()
        };
        let event = pb::RunEvent {
            revision: 9,
            time: Some(prost_types::Timestamp { seconds: 1_700_000_000, nanos: 0 }),
            kind: Some(pb::run_event::Kind::Step(report)),
        };
        let json = to_json(&event).unwrap();
        assert_eq!(json["step"]["memory_bytes"], u64::MAX - 1);
        assert_eq!(json["time"], "2023-11-14T22:13:20Z");
        assert_eq!(from_json::<pb::RunEvent>(&json).unwrap(), event);
    }

    #[test]
    fn what_is_no_event_is_refused() {
        for text in ["3", "{\"revision\": \"x\"}", "{\"colour\": 1}"] {
            assert!(from_json::<pb::RunEvent>(&serde_json::from_str(text).unwrap()).is_err(), "{text}");
        }
    }
}
