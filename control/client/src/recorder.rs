//! Owns the writing of Events: off the caller's path, repeated ones counted up, floods cut down as upstream's
//! correlator does (aggregate after 10 alike in 10 minutes; 25 at once per object, then one per 5 minutes).

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::api::{Api, ObjectMeta, Patch, PatchParams, PostParams};
use kube::{Resource, ResourceExt};
use std::collections::{HashMap, HashSet};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Events beyond this are dropped: they inform, they must never hold up work. Upstream's queue is as long.
const QUEUE: usize = 1000;
/// Entries in each of the correlator's tables, as upstream's LRU caches.
const TABLE: usize = 4096;
const ALIKE: usize = 10;
const ALIKE_WINDOW: Duration = Duration::from_secs(600);
const BURST: f64 = 25.0;
const REFILL_PER_SECOND: f64 = 1.0 / 300.0;

/// Normal or Warning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Something happened as it should.
    Normal,
    /// Something needs attention.
    Warning,
}

impl Kind {
    fn as_str(self) -> &'static str {
        match self {
            Self::Normal => "Normal",
            Self::Warning => "Warning",
        }
    }
}

#[derive(Debug)]
struct Note {
    about: ObjectReference,
    kind: Kind,
    reason: String,
    message: String,
}

/// Hands Events to the task that writes them. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Recorder {
    notes: mpsc::Sender<Note>,
}

/// What writes the Events of one component.
#[derive(Debug)]
pub struct Writer {
    notes: mpsc::Receiver<Note>,
    component: String,
}

/// A recorder for a component, and its writer, to be run beside it.
pub fn recorder(component: &str) -> (Recorder, Writer) {
    let (sender, notes) = mpsc::channel(QUEUE);
    (Recorder { notes: sender }, Writer { notes, component: component.to_owned() })
}

/// A reference to a typed object.
pub fn reference<K: Resource<DynamicType = ()>>(object: &K) -> ObjectReference {
    object.object_ref(&())
}

impl Recorder {
    /// Records an Event about an object. Never blocks.
    pub fn event(&self, about: ObjectReference, kind: Kind, reason: &str, message: String) {
        let note = Note { about, kind, reason: reason.to_owned(), message };
        if let Err(error) = self.notes.try_send(note) {
            tracing::debug!(%error, "an event was dropped");
        }
    }
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Group {
    object: String,
    kind: Kind,
    reason: String,
}

#[derive(Debug)]
struct Alike {
    messages: HashSet<String>,
    last: Instant,
}

#[derive(Clone, Debug)]
struct Written {
    name: String,
    count: i32,
}

#[derive(Debug)]
struct Bucket {
    tokens: f64,
    filled: Instant,
}

/// Decides what becomes of an Event; pure but for the clock it is handed.
#[derive(Debug, Default)]
struct Correlator {
    alike: HashMap<Group, Alike>,
    written: HashMap<(Group, String), Written>,
    buckets: HashMap<String, Bucket>,
}

impl Correlator {
    /// The message to write, or `None` for an Event too many.
    fn admit(&mut self, group: &Group, message: &str, now: Instant) -> Option<String> {
        let alike = entry(&mut self.alike, group.clone(), || Alike { messages: HashSet::new(), last: now });
        if now - alike.last > ALIKE_WINDOW {
            alike.messages.clear();
        }
        alike.last = now;
        if alike.messages.len() < ALIKE {
            alike.messages.insert(message.to_owned());
        }
        let message = if alike.messages.len() < ALIKE {
            message.to_owned()
        } else {
            format!("(combined from similar events): {message}")
        };
        let bucket = entry(&mut self.buckets, group.object.clone(), || Bucket { tokens: BURST, filled: now });
        let refill = (now - bucket.filled).as_secs_f64() * REFILL_PER_SECOND;
        bucket.tokens = (bucket.tokens + refill).min(BURST);
        bucket.filled = now;
        if bucket.tokens < 1.0 {
            return None;
        }
        bucket.tokens -= 1.0;
        Some(message)
    }
}

/// The entry for a key; a full table is emptied first, which costs a few repeated Events and bounds the memory.
fn entry<K: std::hash::Hash + Eq, V>(table: &mut HashMap<K, V>, key: K, new: impl FnOnce() -> V) -> &mut V {
    if table.len() >= TABLE && !table.contains_key(&key) {
        table.clear();
    }
    table.entry(key).or_insert_with(new)
}

impl Writer {
    /// Writes Events until `shutdown`.
    pub async fn run(mut self, client: kube::Client, shutdown: CancellationToken) {
        let mut correlator = Correlator::default();
        loop {
            let note = tokio::select! {
                () = shutdown.cancelled() => return,
                note = self.notes.recv() => note,
            };
            let Some(note) = note else { return };
            tokio::select! {
                () = shutdown.cancelled() => return,
                result = self.write(&client, &mut correlator, note) => {
                    if let Err(error) = result {
                        tracing::debug!(%error, "cannot write an event");
                    }
                }
            }
        }
    }

    async fn write(
        &self,
        client: &kube::Client,
        correlator: &mut Correlator,
        note: Note,
    ) -> kube::Result<()> {
        let object = object_id(&note.about);
        let group = Group { object, kind: note.kind, reason: note.reason.clone() };
        let Some(message) = correlator.admit(&group, &note.message, Instant::now()) else { return Ok(()) };
        let now = Timestamp::now();
        let namespace = note.about.namespace.clone().filter(|ns| !ns.is_empty()).unwrap_or("default".into());
        let api: Api<Event> = Api::namespaced(client.clone(), &namespace);
        // Combined Events differ in their message only, and are counted as one.
        let combined = message.starts_with("(combined");
        let key = (group, if combined { String::new() } else { message.clone() });
        if let Some(before) = correlator.written.get(&key).cloned() {
            let count = before.count + 1;
            let patch = serde_json::json!({"count": count, "lastTimestamp": Time(now), "message": message});
            let patched =
                crate::found(api.patch(&before.name, &PatchParams::default(), &Patch::Merge(patch)).await)?;
            if patched.is_some() {
                correlator.written.insert(key, Written { count, ..before });
                return Ok(());
            }
        }
        let event = self.event(&namespace, &note, message, now);
        let name = event.name_any();
        api.create(&PostParams::default(), &event).await?;
        *entry(&mut correlator.written, key, || Written { name: String::new(), count: 0 }) =
            Written { name, count: 1 };
        Ok(())
    }

    fn event(&self, namespace: &str, note: &Note, message: String, now: Timestamp) -> Event {
        let object = note.about.name.as_deref().unwrap_or_default();
        Event {
            metadata: ObjectMeta {
                name: Some(format!("{object}.{:x}", now.as_nanosecond())),
                namespace: Some(namespace.to_owned()),
                ..ObjectMeta::default()
            },
            involved_object: note.about.clone(),
            reason: Some(note.reason.clone()),
            message: Some(message),
            source: Some(EventSource { component: Some(self.component.clone()), host: None }),
            first_timestamp: Some(Time(now)),
            last_timestamp: Some(Time(now)),
            count: Some(1),
            type_: Some(note.kind.as_str().to_owned()),
            reporting_component: Some(self.component.clone()),
            reporting_instance: Some(String::new()),
            ..Event::default()
        }
    }
}

fn object_id(about: &ObjectReference) -> String {
    let part = |field: &Option<String>| field.clone().unwrap_or_default();
    [part(&about.kind), part(&about.namespace), part(&about.name), part(&about.uid), part(&about.field_path)]
        .join("/")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(object: &str) -> Group {
        Group { object: object.into(), kind: Kind::Normal, reason: "SuccessfulCreate".into() }
    }

    #[test]
    fn many_alike_are_combined_and_a_flood_is_cut() {
        let (mut correlator, now) = (Correlator::default(), Instant::now());
        let written: Vec<_> =
            (0..40).map(|n| correlator.admit(&group("rs"), &format!("Created pod: p{n}"), now)).collect();
        assert_eq!(written[8].as_deref(), Some("Created pod: p8"));
        assert_eq!(written[9].as_deref(), Some("(combined from similar events): Created pod: p9"));
        assert_eq!(written.iter().flatten().count(), 25);
        assert!(correlator.admit(&group("other"), "x", now).is_some(), "limits are per object");
        assert!(correlator.admit(&group("rs"), "x", now + Duration::from_secs(301)).is_some());
    }

    #[test]
    fn tables_are_bounded() {
        let (mut correlator, now) = (Correlator::default(), Instant::now());
        for n in 0..(TABLE * 2 + 10) {
            correlator.admit(&group(&n.to_string()), "x", now);
        }
        assert!(correlator.alike.len() <= TABLE && correlator.buckets.len() <= TABLE);
    }
}
