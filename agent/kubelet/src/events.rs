//! Events: recorded without waiting, sent by one task, repeated ones counted up instead of written anew.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{Api, Patch, PatchParams, PostParams};
use serde_json::json;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::clock;
use crate::pod::{self, PodId};
use crate::start::api_error;

/// Events waiting to be sent; more are dropped and counted: they explain, they never decide.
const QUEUE: usize = 2048;
/// Distinct Events remembered for counting up.
const REMEMBERED: usize = 4096;
/// Events about one object before it is slowed down, and one more each so many seconds (upstream's spam filter).
const BURST: f64 = 25.0;
const REFILL_SECONDS: f64 = 300.0;

/// `Normal` or `Warning`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Kind {
    Normal,
    Warning,
}

/// An Event on its way.
#[derive(Clone, Debug)]
pub(crate) struct Posting {
    object: ObjectReference,
    kind: Kind,
    reason: &'static str,
    message: String,
    node: Arc<str>,
}

/// Takes Events from every task.
#[derive(Clone)]
pub(crate) struct Recorder {
    queue: mpsc::Sender<Posting>,
    node: Arc<str>,
}

impl Recorder {
    pub(crate) fn new(node: &str) -> (Self, mpsc::Receiver<Posting>) {
        let (queue, receiver) = mpsc::channel(QUEUE);
        (Self { queue, node: node.into() }, receiver)
    }

    /// About a pod.
    pub(crate) fn pod(&self, pod: &Pod, kind: Kind, reason: &'static str, message: String) {
        self.post(reference(pod, None), kind, reason, message);
    }

    /// About a container of a pod.
    pub(crate) fn container(
        &self,
        pod: &Pod,
        name: &str,
        (kind, reason): (Kind, &'static str),
        message: String,
    ) {
        let init = pod::find_container(pod, name).is_some_and(|(_, init)| init);
        self.post(reference(pod, Some(pod::field_path(name, init))), kind, reason, message);
    }

    /// About this node.
    pub(crate) fn node(&self, kind: Kind, reason: &'static str, message: String) {
        let object = ObjectReference {
            kind: Some("Node".into()),
            name: Some(self.node.to_string()),
            uid: Some(self.node.to_string()),
            ..ObjectReference::default()
        };
        self.post(object, kind, reason, message);
    }

    fn post(&self, object: ObjectReference, kind: Kind, reason: &'static str, message: String) {
        let posting = Posting { object, kind, reason, message, node: self.node.clone() };
        if self.queue.try_send(posting).is_err() {
            tracing::debug!(reason, "event dropped, the queue is full");
        }
    }
}

fn reference(pod: &Pod, field_path: Option<String>) -> ObjectReference {
    let id = PodId::of(pod);
    ObjectReference {
        api_version: Some("v1".into()),
        kind: Some("Pod".into()),
        namespace: Some(id.namespace),
        name: Some(id.name),
        uid: Some(id.uid),
        resource_version: pod.metadata.resource_version.clone(),
        field_path,
    }
}

type Key = (String, String, Kind, &'static str, String);

struct Known {
    name: String,
    count: i32,
}

struct Bucket {
    tokens: f64,
    at: jiff::Timestamp,
}

/// What has been sent, bounded by forgetting everything when full: counting then begins anew, nothing is lost.
#[derive(Default)]
struct Sent {
    known: HashMap<Key, Known>,
    buckets: BTreeMap<String, Bucket>,
}

impl Sent {
    fn allowed(&mut self, source: &str, now: jiff::Timestamp) -> bool {
        if self.buckets.len() >= REMEMBERED {
            self.buckets.clear();
        }
        let bucket = self.buckets.entry(source.to_owned()).or_insert(Bucket { tokens: BURST, at: now });
        let passed = now.duration_since(bucket.at).as_secs_f64();
        bucket.tokens = (bucket.tokens + passed.max(0.0) / REFILL_SECONDS).min(BURST);
        bucket.at = now;
        if bucket.tokens < 1.0 {
            return false;
        }
        bucket.tokens -= 1.0;
        true
    }
}

/// Sends Events until shutdown.
pub(crate) async fn run(mut queue: mpsc::Receiver<Posting>, client: kube::Client, stop: CancellationToken) {
    let mut sent = Sent::default();
    loop {
        let posting = tokio::select! {
            () = stop.cancelled() => return,
            posting = queue.recv() => posting,
        };
        let Some(posting) = posting else { return };
        if let Err(error) = send(&client, &mut sent, &posting).await {
            tracing::debug!(reason = posting.reason, error = api_error(&error), "cannot send event");
        }
    }
}

async fn send(client: &kube::Client, sent: &mut Sent, posting: &Posting) -> Result<(), kube::Error> {
    let namespace = posting.object.namespace.clone().unwrap_or_else(|| "default".into());
    let api: Api<Event> = Api::namespaced(client.clone(), &namespace);
    let now = clock::now();
    let object = &posting.object;
    let uid = object.uid.clone().unwrap_or_default();
    if !sent.allowed(&uid, now) {
        return Ok(());
    }
    let key = (
        uid,
        object.field_path.clone().unwrap_or_default(),
        posting.kind,
        posting.reason,
        posting.message.clone(),
    );
    if let Some(known) = sent.known.get_mut(&key) {
        let patch = json!({"count": known.count + 1, "lastTimestamp": clock::seconds(now)});
        match api.patch(&known.name, &PatchParams::default(), &Patch::Strategic(patch)).await {
            Ok(_) => {
                known.count += 1;
                return Ok(());
            }
            // It has expired: write it anew.
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            Err(error) => return Err(error),
        }
    }
    let event = new_event(posting, &namespace, now);
    let name = event.metadata.name.clone().unwrap_or_default();
    api.create(&PostParams::default(), &event).await?;
    if sent.known.len() >= REMEMBERED {
        sent.known.clear();
    }
    sent.known.insert(key, Known { name, count: 1 });
    Ok(())
}

fn new_event(posting: &Posting, namespace: &str, now: jiff::Timestamp) -> Event {
    let object = posting.object.clone();
    // Nanoseconds as upstream; the random tail keeps two of the same instant apart.
    let unique = u64::try_from(now.as_nanosecond()).unwrap_or(0) ^ u64::from(rand::random::<u16>());
    Event {
        metadata: ObjectMeta {
            name: Some(format!("{}.{unique:x}", object.name.clone().unwrap_or_default())),
            namespace: Some(namespace.to_owned()),
            ..ObjectMeta::default()
        },
        involved_object: object,
        type_: Some(match posting.kind {
            Kind::Normal => "Normal".into(),
            Kind::Warning => "Warning".into(),
        }),
        reason: Some(posting.reason.into()),
        // The API server's bound on messages.
        message: Some(posting.message.chars().take(1024).collect()),
        count: Some(1),
        first_timestamp: Some(clock::seconds(now)),
        last_timestamp: Some(clock::seconds(now)),
        source: Some(EventSource { component: Some("kubelet".into()), host: Some(posting.node.to_string()) }),
        reporting_component: Some("kubelet".into()),
        reporting_instance: Some(posting.node.to_string()),
        ..Event::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_object_cannot_flood() {
        let mut sent = Sent::default();
        let start = jiff::Timestamp::from_second(0).unwrap();
        let passed = (0..100).filter(|_| sent.allowed("a", start)).count();
        assert_eq!(passed, 25);
        assert!(sent.allowed("b", start));
        assert!(sent.allowed("a", jiff::Timestamp::from_second(301).unwrap()));
        assert!(!sent.allowed("a", jiff::Timestamp::from_second(301).unwrap()));
    }
}
