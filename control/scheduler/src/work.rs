//! Owns the loop: takes watch events into the cache and the queue, makes decisions, sends bindings, and tells of the
//! outcome.

use crate::Config;
use crate::cache::{Cache, NodeFacts};
use crate::decide::{Unschedulable, decide};
use crate::metrics::Result as Outcome;
use crate::pod::PodInfo;
use crate::queue::{Queue, Wake};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Binding, Node, ObjectReference, Pod, PodCondition};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Status, Time};
use kube::api::{Api, Patch, PatchParams, PostParams};
use kube::{Client, ResourceExt};
use parking_lot::Mutex;
use serde_json::json;
use std::collections::BTreeSet;
use std::sync::Arc;
use tokio::sync::{Notify, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use weft_control_client::informer::{Objects, Selection, Sink, follow};
use weft_control_client::recorder::{self, Kind, Recorder};
use weft_control_client::{Chain, found};

/// Requests in flight. More gain nothing once the store commits in groups.
const PARALLEL_WRITES: usize = 64;

#[derive(Default)]
struct State {
    cache: Cache,
    queue: Queue,
}

struct Scheduler {
    config: Config,
    client: Client,
    recorder: Recorder,
    /// Held for the length of one change or one decision, never across an await.
    state: Mutex<State>,
    changed: Notify,
    nodes_synced: watch::Sender<bool>,
    pods_synced: watch::Sender<bool>,
}

/// Schedules until `term` is cancelled.
pub(crate) async fn run(config: Config, client: Client, term: CancellationToken) {
    let (recorder, writer) = recorder::recorder(&config.scheduler_name);
    let scheduler = Arc::new(Scheduler {
        config,
        client: client.clone(),
        recorder,
        state: Mutex::default(),
        changed: Notify::new(),
        nodes_synced: watch::Sender::new(false),
        pods_synced: watch::Sender::new(false),
    });
    let mut tasks = JoinSet::new();
    tasks.spawn(writer.run(client.clone(), term.clone()));
    let (sink, source, stop) = (scheduler.clone(), Objects(Api::<Node>::all(client.clone())), term.clone());
    tasks.spawn(async move { follow(&source, &NodeSink(sink), &Selection::default(), &stop).await });
    let (sink, source, stop) = (scheduler.clone(), Objects(Api::<Pod>::all(client)), term.clone());
    // Finished pods take no room; the server filters them out.
    let fields = "status.phase!=Succeeded,status.phase!=Failed".to_owned();
    let unfinished = Selection { fields: Some(fields), labels: None };
    tasks.spawn(async move { follow(&source, &PodSink(sink), &unfinished, &stop).await });
    let stop = term.clone();
    tasks.spawn(async move { scheduler.schedule(&stop).await });
    while let Some(ended) = tasks.join_next().await {
        if let Err(error) = ended {
            tracing::error!(%error, "the scheduler panicked");
            term.cancel();
        }
    }
}

struct NodeSink(Arc<Scheduler>);

impl Sink<Node> for NodeSink {
    fn replace(&self, nodes: Vec<Node>) {
        let keep: BTreeSet<_> = nodes.iter().map(ResourceExt::name_any).collect();
        {
            let mut state = self.0.state.lock();
            let gone: Vec<_> =
                state.cache.nodes().map(|(n, _)| n.name.clone()).filter(|n| !keep.contains(n)).collect();
            gone.iter().for_each(|name| state.cache.remove_node(name));
        }
        nodes.into_iter().for_each(|node| self.applied(node));
        self.0.nodes_synced.send_replace(true);
    }

    fn applied(&self, node: Node) {
        let mut state = self.0.state.lock();
        if state.cache.set_node(&node.name_any(), NodeFacts::new(&node)) {
            state.queue.wake(Wake::Node, Instant::now());
            self.0.changed.notify_one();
        }
    }

    fn deleted(&self, node: Node) {
        self.0.state.lock().cache.remove_node(&node.name_any());
    }
}

struct PodSink(Arc<Scheduler>);

impl Sink<Pod> for PodSink {
    fn replace(&self, pods: Vec<Pod>) {
        let keep: BTreeSet<_> = pods.iter().filter_map(|p| p.metadata.uid.clone()).collect();
        let gone: Vec<_> = {
            let state = self.0.state.lock();
            state
                .cache
                .placed()
                .chain(state.queue.uids())
                .filter(|uid| !keep.contains(*uid))
                .cloned()
                .collect()
        };
        gone.iter().for_each(|uid| self.gone(uid));
        pods.into_iter().for_each(|pod| self.applied(pod));
        self.0.pods_synced.send_replace(true);
    }

    fn applied(&self, pod: Pod) {
        let pod = PodInfo::new(pod);
        if pod.finished {
            return self.gone(&pod.uid);
        }
        let mut state = self.0.state.lock();
        if !pod.node.is_empty() {
            state.queue.remove(&pod.uid);
            state.cache.place(Arc::new(pod));
        } else if pod.scheduler != self.0.config.scheduler_name || pod.gated || pod.deleting {
            state.queue.remove(&pod.uid);
        } else {
            state.queue.update(Arc::new(pod), Instant::now());
            self.0.changed.notify_one();
        }
    }

    fn deleted(&self, pod: Pod) {
        self.gone(pod.metadata.uid.as_deref().unwrap_or_default());
    }
}

impl PodSink {
    fn gone(&self, uid: &str) {
        let mut state = self.0.state.lock();
        state.queue.remove(uid);
        if state.cache.remove_pod(uid) {
            state.queue.wake(Wake::PodGone, Instant::now());
            self.0.changed.notify_one();
        }
    }
}

/// A decision, taken over into the cache or the queue already.
enum Decision {
    Bind(Arc<PodInfo>),
    Refuse(Arc<PodInfo>, Unschedulable),
}

impl Scheduler {
    async fn schedule(self: Arc<Self>, stop: &CancellationToken) {
        let synced = async {
            // The senders live in self, so waiting can't fail.
            let _ = self.nodes_synced.subscribe().wait_for(|synced| *synced).await;
            let _ = self.pods_synced.subscribe().wait_for(|synced| *synced).await;
        };
        tokio::select! {
            () = stop.cancelled() => return,
            () = synced => {}
        }
        let permits = Arc::new(Semaphore::new(PARALLEL_WRITES));
        let mut writes = JoinSet::new();
        loop {
            while writes.try_join_next().is_some() {}
            let permit = tokio::select! {
                () = stop.cancelled() => break,
                permit = permits.clone().acquire_owned() => permit,
            };
            let Ok(permit) = permit else { break };
            let started = Instant::now();
            let Some(decision) = self.next_decision() else {
                drop(permit);
                tokio::select! {
                    () = stop.cancelled() => break,
                    () = self.wait_for_change() => continue,
                }
            };
            let scheduler = self.clone();
            writes.spawn(async move {
                match decision {
                    Decision::Bind(pod) => scheduler.bind(&pod, started).await,
                    Decision::Refuse(pod, why) => scheduler.refuse(&pod, &why, started).await,
                }
                drop(permit);
            });
        }
        // What was decided is still sent, so that no assumed pod is lost.
        while writes.join_next().await.is_some() {}
    }

    async fn wait_for_change(&self) {
        let ripe = self.state.lock().queue.next_ripe();
        match ripe {
            Some(at) => {
                tokio::select! {
                    () = self.changed.notified() => {}
                    () = tokio::time::sleep_until(at) => {}
                }
            }
            None => self.changed.notified().await,
        }
    }

    fn next_decision(&self) -> Option<Decision> {
        let mut state = self.state.lock();
        let pod = state.queue.pop(Instant::now());
        let decision = pod.map(|pod| match decide(&pod, &state.cache, |n| rand::random_range(0..n)) {
            Ok(node) => {
                let placed = Arc::new(PodInfo { node, ..(*pod).clone() });
                state.cache.place(placed.clone());
                Decision::Bind(placed)
            }
            Err(why) => {
                state.queue.unschedulable(&pod.uid, why.plugins.clone());
                Decision::Refuse(pod, why)
            }
        });
        self.config.metrics.pending(state.queue.counts());
        decision
    }

    async fn bind(&self, pod: &PodInfo, started: Instant) {
        let binding = Binding {
            metadata: ObjectMeta {
                name: Some(pod.name.clone()),
                namespace: Some(pod.namespace.clone()),
                uid: Some(pod.uid.clone()),
                ..ObjectMeta::default()
            },
            target: ObjectReference {
                kind: Some("Node".into()),
                name: Some(pod.node.clone()),
                ..ObjectReference::default()
            },
        };
        let api: Api<Pod> = Api::namespaced(self.client.clone(), &pod.namespace);
        let bound: kube::Result<Status> =
            api.create_subresource("binding", &pod.name, &PostParams::default(), &binding).await;
        match bound {
            Ok(_) => {
                self.count(Outcome::Scheduled, started);
                tracing::debug!(pod = %pod.key(), node = %pod.node, "bound");
                let text = format!("Successfully assigned {} to {}", pod.key(), pod.node);
                self.recorder.event(reference(pod), Kind::Normal, "Scheduled", text);
            }
            Err(error) => {
                self.count(Outcome::Error, started);
                self.binding_failed(pod, &error);
            }
        }
    }

    fn binding_failed(&self, pod: &PodInfo, error: &kube::Error) {
        let now = Instant::now();
        let mut state = self.state.lock();
        state.cache.remove_pod(&pod.uid);
        state.queue.failed(&pod.uid, now);
        state.queue.wake(Wake::PodGone, now);
        self.changed.notify_one();
        drop(state);
        if weft_control_client::classify(error) == weft_control_client::Class::NotFound {
            return;
        }
        tracing::warn!(pod = %pod.key(), node = %pod.node, error = %Chain(error), "binding failed");
        let text = format!("binding rejected: {error}");
        self.recorder.event(reference(pod), Kind::Warning, "FailedScheduling", text);
    }

    async fn refuse(&self, pod: &PodInfo, why: &Unschedulable, started: Instant) {
        self.count(Outcome::Unschedulable, started);
        self.recorder.event(reference(pod), Kind::Warning, "FailedScheduling", why.message.clone());
        let Some(condition) = condition(pod, why, Timestamp::now()) else { return };
        let patch =
            Patch::Strategic(json!({"metadata": {"uid": pod.uid}, "status": {"conditions": [condition]}}));
        let api: Api<Pod> = Api::namespaced(self.client.clone(), &pod.namespace);
        if let Err(error) = found(api.patch_status(&pod.name, &PatchParams::default(), &patch).await) {
            tracing::warn!(pod = %pod.key(), error = %Chain(&error), "cannot write the pod's condition");
        }
    }

    fn count(&self, outcome: Outcome, started: Instant) {
        let seconds = started.elapsed().as_secs_f64();
        self.config.metrics.attempt(&self.config.scheduler_name, outcome, seconds);
    }
}

/// The condition to write, unless the pod has it already.
fn condition(pod: &PodInfo, why: &Unschedulable, now: Timestamp) -> Option<PodCondition> {
    let old = pod.condition.as_ref();
    let same = old.is_some_and(|c| {
        c.status == "False"
            && c.reason.as_deref() == Some("Unschedulable")
            && c.message.as_ref() == Some(&why.message)
    });
    if same {
        return None;
    }
    let since = old.filter(|c| c.status == "False").and_then(|c| c.last_transition_time.clone());
    Some(PodCondition {
        type_: "PodScheduled".into(),
        status: "False".into(),
        reason: Some("Unschedulable".into()),
        message: Some(why.message.clone()),
        last_transition_time: since.or(Some(Time(now))),
        ..PodCondition::default()
    })
}

fn reference(pod: &PodInfo) -> ObjectReference {
    ObjectReference {
        api_version: Some("v1".into()),
        kind: Some("Pod".into()),
        namespace: Some(pod.namespace.clone()),
        name: Some(pod.name.clone()),
        uid: Some(pod.uid.clone()),
        resource_version: pod.resource_version.clone(),
        ..ObjectReference::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_condition_is_written_when_it_says_something_new() {
        let why = |text: &str| Unschedulable { message: text.into(), plugins: BTreeSet::new() };
        let at = |s| Timestamp::from_second(s).unwrap();
        let mut pod = PodInfo::default();
        let first = condition(&pod, &why("full"), at(1)).unwrap();
        pod.condition = Some(first);
        assert!(condition(&pod, &why("full"), at(2)).is_none());
        let second = condition(&pod, &why("fuller"), at(2)).unwrap();
        assert_eq!(second.last_transition_time, Some(Time(at(1))), "the status is the same as before");
    }
}
