//! ConfigMaps and Secrets that pods refer to: one watch per object, shared by all who hold it, ended with the last.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Weak};
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Secret};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::task::AbortHandle;

use crate::pod;

/// How long a pod waits for the first answer about an object before that counts as a failure to be retried.
const FIRST_ANSWER: Duration = Duration::from_secs(10);

/// ConfigMap or Secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Kind {
    ConfigMap,
    Secret,
}

impl Kind {
    /// As upstream's messages begin.
    pub(crate) fn lower(self) -> &'static str {
        match self {
            Self::ConfigMap => "configmap",
            Self::Secret => "secret",
        }
    }

    /// As the kind is spelled.
    pub(crate) fn spelled(self) -> &'static str {
        match self {
            Self::ConfigMap => "ConfigMap",
            Self::Secret => "Secret",
        }
    }
}

/// The payload of either kind, by key.
pub(crate) type Data = BTreeMap<String, Vec<u8>>;

/// What is known of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Known {
    /// The first answer is not there yet.
    Unknown,
    /// It does not exist.
    Absent,
    /// It exists.
    Present(Arc<Data>),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    kind: Kind,
    namespace: String,
    name: String,
}

struct Entry {
    state: watch::Receiver<Known>,
    task: AbortHandle,
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The right to read an object, and to hear of its changes.
#[derive(Clone)]
pub(crate) struct Handle {
    entry: Arc<Entry>,
    kind: Kind,
    name: String,
}

/// An object could not be had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ReadError {
    #[error("{kind} \"{name}\" not found", kind = kind.lower())]
    NotFound { kind: Kind, name: String },
    #[error("failed to sync {kind} cache: timed out waiting for the condition", kind = kind.lower())]
    NoAnswer { kind: Kind },
}

impl Handle {
    /// The payload; waits for the first answer of the API server.
    pub(crate) async fn read(&self) -> Result<Arc<Data>, ReadError> {
        let mut state = self.entry.state.clone();
        let answered =
            tokio::time::timeout(FIRST_ANSWER, state.wait_for(|known| *known != Known::Unknown)).await;
        match answered {
            Ok(Ok(known)) => match &*known {
                Known::Present(data) => Ok(data.clone()),
                Known::Absent => Err(ReadError::NotFound { kind: self.kind, name: self.name.clone() }),
                Known::Unknown => Err(ReadError::NoAnswer { kind: self.kind }),
            },
            Ok(Err(_)) | Err(_) => Err(ReadError::NoAnswer { kind: self.kind }),
        }
    }

    /// A receiver that wakes on changes from now on.
    pub(crate) fn changes(&self) -> watch::Receiver<Known> {
        let mut state = self.entry.state.clone();
        state.mark_unchanged();
        state
    }
}

/// All objects in use.
pub(crate) struct Objects {
    client: Client,
    entries: Mutex<HashMap<Key, Weak<Entry>>>,
}

impl Objects {
    pub(crate) fn new(client: Client) -> Self {
        Self { client, entries: Mutex::default() }
    }

    /// Takes hold of an object; the first holder starts its watch.
    pub(crate) fn hold(&self, kind: Kind, namespace: &str, name: &str) -> Handle {
        let key = Key { kind, namespace: namespace.to_owned(), name: name.to_owned() };
        let mut entries = self.entries.lock();
        if let Some(entry) = entries.get(&key).and_then(Weak::upgrade) {
            return Handle { entry, kind, name: name.to_owned() };
        }
        entries.retain(|_, entry| entry.strong_count() > 0);
        let (sender, state) = watch::channel(Known::Unknown);
        let task = match kind {
            Kind::ConfigMap => {
                let api: Api<ConfigMap> = Api::namespaced(self.client.clone(), namespace);
                tokio::spawn(follow(api, name.to_owned(), sender, of_config_map)).abort_handle()
            }
            Kind::Secret => {
                let api: Api<Secret> = Api::namespaced(self.client.clone(), namespace);
                tokio::spawn(follow(api, name.to_owned(), sender, of_secret)).abort_handle()
            }
        };
        let entry = Arc::new(Entry { state, task });
        entries.insert(key, Arc::downgrade(&entry));
        Handle { entry, kind, name: name.to_owned() }
    }

    /// Takes hold of everything that a pod refers to, so that it is read once and stays while the pod does.
    pub(crate) fn hold_all(&self, pod: &Pod) -> Vec<Handle> {
        let namespace = pod.metadata.namespace.clone().unwrap_or_default();
        references(pod).into_iter().map(|(kind, name)| self.hold(kind, &namespace, &name)).collect()
    }
}

fn of_config_map(object: ConfigMap) -> Data {
    let text = object.data.unwrap_or_default().into_iter().map(|(key, value)| (key, value.into_bytes()));
    let binary = object.binary_data.unwrap_or_default().into_iter().map(|(key, value)| (key, value.0));
    text.chain(binary).collect()
}

fn of_secret(object: Secret) -> Data {
    object.data.unwrap_or_default().into_iter().map(|(key, value)| (key, value.0)).collect()
}

async fn follow<K>(api: Api<K>, name: String, state: watch::Sender<Known>, data: fn(K) -> Data)
where
    K: kube::Resource + Clone + serde::de::DeserializeOwned + std::fmt::Debug + Send + 'static,
{
    let config = watcher::Config::default().fields(&format!("metadata.name={name}"));
    let mut stream = std::pin::pin!(watcher(api, config).default_backoff());
    let mut listed: Option<Data> = None;
    while let Some(event) = stream.next().await {
        match event {
            Ok(watcher::Event::Init) => listed = None,
            Ok(watcher::Event::InitApply(object)) => listed = Some(data(object)),
            Ok(watcher::Event::InitDone) => set(&state, listed.take()),
            Ok(watcher::Event::Apply(object)) => set(&state, Some(data(object))),
            Ok(watcher::Event::Delete(_)) => set(&state, None),
            Err(error) => tracing::warn!(object = name, %error, "cannot watch an object of a pod"),
        }
    }
}

fn set(state: &watch::Sender<Known>, data: Option<Data>) {
    let known = data.map_or(Known::Absent, |data| Known::Present(Arc::new(data)));
    state.send_if_modified(|old| {
        let changed = *old != known;
        *old = known;
        changed
    });
}

/// The objects that a pod names, without repetition.
pub(crate) fn references(pod: &Pod) -> std::collections::BTreeSet<(Kind, String)> {
    let mut found = std::collections::BTreeSet::new();
    let mut add = |kind: Kind, name: &str| {
        if !name.is_empty() {
            found.insert((kind, name.to_owned()));
        }
    };
    for (container, _) in pod::all_containers(pod) {
        for from in container.env_from.iter().flatten() {
            from.config_map_ref.iter().for_each(|r| add(Kind::ConfigMap, &r.name));
            from.secret_ref.iter().for_each(|r| add(Kind::Secret, &r.name));
        }
        for source in container.env.iter().flatten().filter_map(|e| e.value_from.as_ref()) {
            source.config_map_key_ref.iter().for_each(|r| add(Kind::ConfigMap, &r.name));
            source.secret_key_ref.iter().for_each(|r| add(Kind::Secret, &r.name));
        }
    }
    for volume in pod::spec(pod).volumes.iter().flatten() {
        volume.config_map.iter().for_each(|c| add(Kind::ConfigMap, &c.name));
        volume.secret.iter().for_each(|s| add(Kind::Secret, s.secret_name.as_deref().unwrap_or_default()));
        for source in volume.projected.iter().flat_map(|p| p.sources.iter().flatten()) {
            source.config_map.iter().for_each(|c| add(Kind::ConfigMap, &c.name));
            source.secret.iter().for_each(|s| add(Kind::Secret, &s.name));
        }
    }
    found
}
