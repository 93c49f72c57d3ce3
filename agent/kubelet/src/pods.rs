//! The source of pods: watch events of the API server and events of the runtime, handed to one worker per pod.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use futures::StreamExt;
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::runtime::{WatchStreamExt, watcher};
use tokio::sync::{broadcast, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use weft_agent_runtime as runtime;
use weft_agent_runtime::RuntimeEvent;

use crate::admission::{self, Allocatable};
use crate::pod::{self, PodId};
use crate::shared::Shared;
use crate::worker::{self, Adopted, Inbox, Message, Update};
use weft_agent_runtime::chain;

/// What the runtime had when the kubelet started.
pub(crate) struct Found {
    pub(crate) sandboxes: Vec<runtime::Sandbox>,
    pub(crate) containers: Vec<runtime::Container>,
}

struct Handle {
    update: watch::Sender<Update>,
    inbox: Inbox,
}

struct Pods {
    shared: Arc<Shared>,
    workers: JoinSet<PodId>,
    handles: HashMap<String, Handle>,
    found: HashMap<String, Adopted>,
    /// Uids of a listing in progress.
    listing: Option<HashSet<String>>,
    orphans_removed: bool,
}

/// Runs until shutdown; then the workers stop where they are and the pods go on.
pub(crate) async fn run(
    shared: Arc<Shared>,
    found: Found,
    mut events: broadcast::Receiver<RuntimeEvent>,
    stop: CancellationToken,
) {
    let api: Api<Pod> = Api::all(shared.client.clone());
    let config = watcher::Config::default().fields(&format!("spec.nodeName={}", shared.config.node_name));
    let mut stream = std::pin::pin!(watcher(api, config).default_backoff());
    let mut pods = Pods {
        shared,
        workers: JoinSet::new(),
        handles: HashMap::new(),
        found: by_pod(found),
        listing: None,
        orphans_removed: false,
    };
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            event = events.recv() => match event {
                Ok(event) => pods.runtime_event(event),
                Err(broadcast::error::RecvError::Lagged(missed)) => {
                    tracing::warn!(missed, "runtime events missed, looking at all containers");
                    pods.handles.values().for_each(|h| h.inbox.offer(Message::LookAgain));
                }
                Err(broadcast::error::RecvError::Closed) => return,
            },
            event = stream.next() => match event {
                Some(Ok(event)) => pods.source_event(event),
                Some(Err(error)) => tracing::warn!(error = %chain(&error), "cannot watch pods"),
                None => return,
            },
            Some(ended) = pods.workers.join_next(), if !pods.workers.is_empty() => match ended {
                Ok(id) => pods.forget(&id),
                Err(error) => tracing::error!(%error, "a pod's worker panicked"),
            },
        }
    }
}

fn by_pod(found: Found) -> HashMap<String, Adopted> {
    let mut map: HashMap<String, Adopted> = HashMap::new();
    let mut owner = HashMap::new();
    for sandbox in found.sandboxes {
        owner.insert(sandbox.id.clone(), sandbox.spec.uid.clone());
        map.entry(sandbox.spec.uid.clone()).or_default().sandboxes.push(sandbox);
    }
    for container in found.containers {
        if let Some(uid) = owner.get(&container.sandbox_id) {
            map.entry(uid.clone()).or_default().containers.push(container);
        }
    }
    map
}

impl Pods {
    fn source_event(&mut self, event: watcher::Event<Pod>) {
        match event {
            watcher::Event::Init => self.listing = Some(HashSet::new()),
            watcher::Event::InitApply(pod) => {
                if let Some(listing) = &mut self.listing {
                    listing.insert(PodId::of(&pod).uid);
                }
                self.apply(pod);
            }
            watcher::Event::InitDone => {
                let listed = self.listing.take().unwrap_or_default();
                for (uid, handle) in &self.handles {
                    if !listed.contains(uid) {
                        remove(handle, None);
                    }
                }
                if !std::mem::replace(&mut self.orphans_removed, true) {
                    self.remove_orphans();
                }
            }
            watcher::Event::Apply(pod) => self.apply(pod),
            watcher::Event::Delete(pod) => {
                if let Some(handle) = self.handles.get(&PodId::of(&pod).uid) {
                    remove(handle, Some(pod));
                }
            }
        }
    }

    fn apply(&mut self, pod: Pod) {
        let uid = PodId::of(&pod).uid;
        if let Some(handle) = self.handles.get(&uid) {
            let pod = Arc::new(pod);
            handle.update.send_modify(|update| update.pod = pod);
            return;
        }
        let adopted = self.found.remove(&uid).unwrap_or_default();
        // What runs already was admitted before; what has ended needs no room.
        let known = !adopted.sandboxes.is_empty() || pod::is_terminal(&pod) || pod::is_deleting(&pod);
        let rejected = if known { None } else { self.admit(&pod) };
        let update = watch::Sender::new(Update { pod: Arc::new(pod), removed: false, rejected });
        let (inbox, messages) = Inbox::new();
        let worker = worker::run(self.shared.clone(), update.subscribe(), (inbox.clone(), messages), adopted);
        self.workers.spawn(worker);
        self.handles.insert(uid, Handle { update, inbox });
    }

    fn admit(&self, pod: &Pod) -> Option<admission::Rejection> {
        let taken: Vec<Arc<Pod>> = self
            .handles
            .values()
            .filter_map(|h| {
                let update = h.update.borrow();
                (update.rejected.is_none() && !pod::is_terminal(&update.pod)).then(|| update.pod.clone())
            })
            .collect();
        let node = Allocatable {
            resources: self.shared.machine.allocatable(),
            labels: self.shared.machine.labels(&self.shared.config),
        };
        admission::admit(pod, taken.iter().map(Arc::as_ref), &node).err()
    }

    fn runtime_event(&self, event: RuntimeEvent) {
        let (uid, message) = match event {
            RuntimeEvent::ContainerExited { pod_uid, container_id } => {
                (pod_uid, Message::Exited(container_id))
            }
            RuntimeEvent::SandboxDied { pod_uid, sandbox_id } => (pod_uid, Message::SandboxDied(sandbox_id)),
        };
        if let Some(handle) = self.handles.get(&uid) {
            handle.inbox.offer(message);
        }
    }

    fn forget(&mut self, id: &PodId) {
        self.handles.remove(&id.uid);
    }

    /// Ends what the runtime has and the API has not, and removes folders of pods that neither has.
    fn remove_orphans(&mut self) {
        for (uid, adopted) in std::mem::take(&mut self.found) {
            let Some(id) = adopted.sandboxes.first().map(|s| PodId {
                namespace: s.spec.namespace.clone(),
                name: s.spec.name.clone(),
                uid: uid.clone(),
            }) else {
                continue;
            };
            tracing::info!(pod = %id, "removing a pod that the API server does not have");
            self.workers.spawn(remove_orphan(self.shared.clone(), id, adopted));
        }
        let known: HashSet<String> = self.handles.keys().cloned().collect();
        let folders = std::fs::read_dir(self.shared.config.pods_dir()).into_iter().flatten().flatten();
        for uid in folders.filter_map(|f| f.file_name().into_string().ok()).filter(|uid| !known.contains(uid))
        {
            let shared = self.shared.clone();
            // Its names are not known any more, so only the folder goes here; logs are found by their own names below.
            self.workers.spawn(async move {
                let id = PodId { namespace: String::new(), name: String::new(), uid };
                worker::remove_folders(&shared, &id).await;
                id
            });
        }
        self.remove_orphan_logs(&known);
    }

    fn remove_orphan_logs(&mut self, known: &HashSet<String>) {
        let folders = std::fs::read_dir(&self.shared.config.pod_log_dir).into_iter().flatten().flatten();
        for name in folders.filter_map(|f| f.file_name().into_string().ok()) {
            let parts: Vec<&str> = name.split('_').collect();
            let &[namespace, pod, uid] = parts.as_slice() else { continue };
            if !known.contains(uid) {
                let shared = self.shared.clone();
                let id = PodId { namespace: namespace.to_owned(), name: pod.to_owned(), uid: uid.to_owned() };
                self.workers.spawn(async move {
                    worker::remove_folders(&shared, &id).await;
                    id
                });
            }
        }
    }
}

fn remove(handle: &Handle, last: Option<Pod>) {
    let last = last.map(Arc::new);
    handle.update.send_modify(|update| {
        update.removed = true;
        if let Some(pod) = last {
            update.pod = pod;
        }
    });
}

async fn remove_orphan(shared: Arc<Shared>, id: PodId, adopted: Adopted) -> PodId {
    let mut graces = BTreeMap::new();
    for container in &adopted.containers {
        let grace = container.spec.annotations.get(crate::observed::keys::GRACE).and_then(|g| g.parse().ok());
        graces.insert(container.id.clone(), std::time::Duration::from_secs(grace.unwrap_or(30)));
    }
    let stops = graces.iter().map(|(container, grace)| shared.runtime.stop_container(container, *grace));
    for result in futures::future::join_all(stops).await {
        if let Err(error) = result {
            tracing::debug!(pod = %id, error = %chain(&error), "cannot stop a container of an orphaned pod");
        }
    }
    for sandbox in &adopted.sandboxes {
        let ended = shared.runtime.stop_sandbox(&sandbox.id).await;
        let ended = if ended.is_ok() { shared.runtime.remove_sandbox(&sandbox.id).await } else { ended };
        if let Err(error) = ended {
            tracing::warn!(pod = %id, error = %chain(&error), "cannot remove an orphaned pod");
        }
    }
    worker::remove_folders(&shared, &id).await;
    id
}
