//! One pod's worker: it alone decides and acts for its pod. Long steps run as jobs of its own, so that it always hears
//! what happens meanwhile.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, PodStatus};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use weft_agent_runtime as runtime;

use crate::admission::Rejection;
use crate::backoff;
use crate::clock;
use crate::events::Kind;
use crate::objects::Handle;
use crate::observed::{ContainerView, Ending, Observed, ProbeState, SandboxView, Waiting};
use crate::plan::{self, Action};
use crate::pod::{self, PodId};
use crate::probes::{Kind as ProbeKind, Probes, Subject, Verdict};
use crate::shared::Shared;
use crate::start::{self, Failure};
use crate::status;
use crate::status_writer::{self, Seen, Wanted};
use crate::terminating;
use crate::volumes::{self, Mounted};

mod cleanup;
mod jobs;
mod report;

pub(crate) use cleanup::remove_folders;
use report::with_own_status;

/// Messages waiting for a worker; when there is no room, it looks at everything again instead.
pub(crate) const INBOX: usize = 64;
/// Replaced sandboxes whose records are kept.
const OLDER_KEPT: usize = 2;
/// A step that failed (volumes, sandbox, configuration) is tried again after this, doubling up to the bound.
const RETRY_FIRST: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(120);
/// A container that can't be configured is tried again so often (upstream); a changed ConfigMap or Secret does it at once.
const CONFIG_RETRY: Duration = Duration::from_secs(10);

/// What a worker is told.
#[derive(Clone, Debug)]
pub(crate) enum Message {
    /// A container ended.
    Exited(String),
    /// The sandbox's init died.
    SandboxDied(String),
    /// A probe changed its verdict.
    Probe(Verdict),
    /// A container runs, while its start is not yet done (postStart hook).
    Running(Box<ContainerView>, String),
    /// Something may have been missed.
    LookAgain,
}

/// The way to a worker.
#[derive(Clone)]
pub(crate) struct Inbox {
    sender: mpsc::Sender<Message>,
    overflow: Arc<AtomicBool>,
}

impl Inbox {
    pub(crate) fn new() -> (Self, mpsc::Receiver<Message>) {
        let (sender, receiver) = mpsc::channel(INBOX);
        (Self { sender, overflow: Arc::default() }, receiver)
    }

    /// Waits for room.
    pub(crate) async fn send(&self, message: Message) -> Result<(), mpsc::error::SendError<Message>> {
        self.sender.send(message).await
    }

    /// Never waits: with no room left the worker is told to look at everything, once it has worked off what it has.
    pub(crate) fn offer(&self, message: Message) {
        if self.sender.try_send(message).is_err() {
            self.overflow.store(true, Ordering::Release);
        }
    }
}

/// The pod as its source has it.
#[derive(Clone, Debug)]
pub(crate) struct Update {
    pub(crate) pod: Arc<Pod>,
    /// It is no longer in the API.
    pub(crate) removed: bool,
    /// The node refused it.
    pub(crate) rejected: Option<Rejection>,
}

/// What the runtime had of a pod when the kubelet started.
#[derive(Debug, Default)]
pub(crate) struct Adopted {
    pub(crate) sandboxes: Vec<runtime::Sandbox>,
    pub(crate) containers: Vec<runtime::Container>,
}

/// The end of a job.
enum Done {
    Mounted(Result<Mounted, volumes::Error>),
    Sandbox(Result<runtime::Sandbox, runtime::Error>),
    Started {
        name: String,
        result: Result<ContainerView, Failure>,
    },
    Killed {
        name: String,
        id: String,
        view: Option<ContainerView>,
    },
    SandboxStopped(Result<(), runtime::Error>),
    /// A ConfigMap or Secret that a container waits for may be there now.
    ObjectChanged(String),
    Pruned,
}

pub(crate) struct Worker {
    shared: Arc<Shared>,
    id: PodId,
    update: watch::Receiver<Update>,
    inbox: Inbox,
    messages: mpsc::Receiver<Message>,
    pod: Arc<Pod>,
    observed: Observed,
    jobs: JoinSet<Done>,
    /// The present forward step, to be abandoned when the pod ends.
    step: Option<tokio::task::AbortHandle>,
    step_may_stop: bool,
    mounted: Arc<Mounted>,
    /// Stopped sandboxes that the present one replaced, oldest first; their containers' records tell of the past.
    older: VecDeque<String>,
    handles: Vec<Handle>,
    keeper: Option<JoinSet<()>>,
    keeper_pod: watch::Sender<Arc<Pod>>,
    probes: HashMap<String, Probes>,
    grace: watch::Sender<Duration>,
    status: Option<PodStatus>,
    writer: watch::Sender<Wanted>,
    failures: u32,
    seen_at: tokio::time::Instant,
    start_measured: bool,
}

/// Runs a pod until it is gone from the API and from this node.
pub(crate) async fn run(
    shared: Arc<Shared>,
    update: watch::Receiver<Update>,
    (inbox, messages): (Inbox, mpsc::Receiver<Message>),
    adopted: Adopted,
) -> PodId {
    let pod = update.borrow().pod.clone();
    let id = PodId::of(&pod);
    let (writer, wanted) = watch::channel(Wanted::default());
    let mut background = JoinSet::new();
    background.spawn(status_writer::run(shared.clone(), id.clone(), pod.status.clone(), wanted));
    let mut worker = Worker {
        handles: shared.objects.hold_all(&pod),
        grace: watch::Sender::new(pod::grace(&pod)),
        keeper_pod: watch::Sender::new(pod.clone()),
        keeper: None,
        shared,
        id: id.clone(),
        update,
        inbox,
        messages,
        observed: Observed::default(),
        jobs: JoinSet::new(),
        step: None,
        step_may_stop: false,
        mounted: Arc::default(),
        older: VecDeque::new(),
        probes: HashMap::new(),
        status: pod.status.clone(),
        pod,
        writer,
        failures: 0,
        seen_at: tokio::time::Instant::now(),
        start_measured: false,
    };
    worker.adopt(adopted).await;
    worker.run().await;
    id
}

impl Worker {
    async fn run(&mut self) {
        loop {
            let wake = self.advance();
            if self.over() {
                self.clean_up().await;
                return;
            }
            let sleep = async {
                match wake {
                    Some(at) => tokio::time::sleep(clock::until(at, clock::now())).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                changed = self.update.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    self.updated();
                }
                Some(message) = self.messages.recv() => self.heard(message).await,
                Some(done) = self.jobs.join_next(), if !self.jobs.is_empty() => self.finished(done).await,
                () = sleep => {}
            }
            while let Ok(message) = self.messages.try_recv() {
                self.heard(message).await;
            }
            while let Some(done) = self.jobs.try_join_next() {
                self.finished(done).await;
            }
            if self.inbox.overflow.swap(false, Ordering::AcqRel) {
                self.look_at_all().await;
            }
        }
    }

    /// Takes over what an earlier kubelet left running.
    async fn adopt(&mut self, mut adopted: Adopted) {
        adopted.sandboxes.sort_by_key(|s| (s.spec.attempt, s.created_at_ns));
        if let Some(newest) = adopted.sandboxes.pop() {
            self.observed.sandbox = Some(SandboxView::from(&newest));
        }
        for old in adopted.sandboxes {
            self.older.push_back(old.id.clone());
            let runtime = self.shared.runtime.clone();
            self.jobs.spawn(async move {
                let _ = runtime.stop_sandbox(&old.id).await;
                Done::Pruned
            });
        }
        for container in &adopted.containers {
            self.observed.record(&container.spec.name, ContainerView::from(container));
        }
        let ids: Vec<_> = self.observed.all().map(|(name, c)| (name.clone(), c.id.clone())).collect();
        for (name, id) in ids {
            if let Some(view) = terminating::look(&self.shared.runtime, &id).await {
                self.observed.record(&name, view);
            }
        }
        self.restore_probes();
        if pod::is_terminal(&self.pod) {
            self.observed.ending = Some(Ending::Finished);
        }
        self.updated();
    }

    /// Containers that were ready stay so until a probe says otherwise.
    fn restore_probes(&mut self) {
        let known = self.pod.status.clone().unwrap_or_default();
        let statuses = known.container_statuses.into_iter().chain(known.init_container_statuses).flatten();
        for status in statuses {
            let id = status.container_id.unwrap_or_default();
            let id = id.strip_prefix(status::ID_SCHEME).unwrap_or_default().to_owned();
            if !id.is_empty() {
                let started = status.started.unwrap_or(false);
                let state =
                    ProbeState { ready: status.ready.then_some(true), started, ..ProbeState::default() };
                self.observed.probes.insert(id, state);
            }
        }
        let running: Vec<_> =
            self.observed.all().filter(|(_, c)| c.running()).map(|(n, c)| (n.clone(), c.clone())).collect();
        for (name, view) in running {
            self.begin_probes(&name, &view);
        }
    }

    /// The source has news of the pod.
    fn updated(&mut self) {
        let update = self.update.borrow_and_update().clone();
        if let Some(seen) = Seen::of(&update.pod) {
            self.writer.send_modify(|wanted| wanted.seen = Some(seen));
        }
        self.pod = Arc::new(with_own_status(&update.pod, self.status.as_ref()));
        self.keeper_pod.send_replace(self.pod.clone());
        let ending = if update.removed {
            Some(Ending::Removed)
        } else if pod::is_deleting(&self.pod) {
            Some(Ending::Deleted)
        } else {
            update.rejected.map(|r| Ending::Rejected { reason: r.reason, message: r.message })
        };
        if let Some(ending) = ending {
            let grace = if update.removed && !pod::is_deleting(&self.pod) {
                // Nobody waits for its end, but its processes still get the time that the pod asked for.
                pod::grace(&self.pod)
            } else {
                pod::grace(&self.pod).min(if self.observed.ending.is_some() {
                    *self.grace.borrow()
                } else {
                    Duration::MAX
                })
            };
            self.grace.send_if_modified(|old| std::mem::replace(old, grace) != grace);
            self.end(ending);
        }
    }

    /// The pod is to end. A rejection or deadline stays the reason that is reported until the pod is deleted.
    fn end(&mut self, ending: Ending) {
        if self.observed.ending == Some(Ending::Removed) {
            return;
        }
        if let (Ending::Rejected { reason, message }, None) = (&ending, &self.observed.ending) {
            tracing::info!(pod = %self.id, reason, message, "pod refused");
        }
        self.observed.ending = Some(ending);
        self.probes.values().for_each(Probes::end_liveness);
        // A wait for an object, a hook or a volume ends; making a sandbox or container is let finish.
        if self.step_may_stop
            && let Some(step) = self.step.take()
        {
            step.abort();
            self.observed.busy = false;
        }
    }

    async fn heard(&mut self, message: Message) {
        match message {
            Message::Exited(id) => {
                let name = self.observed.all().find(|(_, c)| c.id == id).map(|(name, _)| name.clone());
                if let Some(name) = name {
                    self.look_at(&name, &id).await;
                }
            }
            Message::SandboxDied(id) => {
                if let Some(sandbox) = self.observed.sandbox.as_mut().filter(|s| s.id == id) {
                    sandbox.ready = false;
                    if self.observed.ending.is_none() {
                        let message = "Pod sandbox changed, it will be killed and re-created.".to_owned();
                        self.shared.events.pod(&self.pod, Kind::Normal, "SandboxChanged", message);
                    }
                }
                self.look_at_all().await;
            }
            Message::Probe(verdict) => self.probed(&verdict),
            Message::Running(view, name) => {
                self.begin_probes(&name, &view);
                self.observed.record(&name, *view);
            }
            Message::LookAgain => self.look_at_all().await,
        }
    }

    fn probed(&mut self, verdict: &Verdict) {
        let state = self.observed.probes.entry(verdict.container_id.clone()).or_default();
        match (verdict.kind, verdict.good) {
            (ProbeKind::Readiness, good) => state.ready = Some(good),
            (ProbeKind::Startup, true) => {
                state.started = true;
                if let Some(probes) = self.probes.get(&verdict.container_id) {
                    probes.set_started();
                }
            }
            (ProbeKind::Startup, false) => state.startup_failed = true,
            (ProbeKind::Liveness, good) => state.liveness_failed = !good,
        }
    }

    async fn look_at(&mut self, name: &str, id: &str) {
        if let Some(view) = terminating::look(&self.shared.runtime, id).await {
            if !view.running() {
                self.probes.remove(id);
            }
            self.observed.record(name, view);
        }
    }

    async fn look_at_all(&mut self) {
        let running: Vec<_> = self
            .observed
            .all()
            .filter(|(_, c)| c.exit().is_none())
            .map(|(n, c)| (n.clone(), c.id.clone()))
            .collect();
        for (name, id) in running {
            self.look_at(&name, &id).await;
        }
    }

    fn begin_probes(&mut self, name: &str, view: &ContainerView) {
        let Some((container, init)) = pod::find_container(&self.pod, name) else { return };
        let runtime::ContainerState::Running { started_at_ns } = view.state else { return };
        if (init && !pod::is_sidecar(container)) || self.probes.contains_key(&view.id) {
            return;
        }
        let facts = start::facts(&self.shared, &self.pod, self.observed.sandbox.as_ref());
        let subject = Subject {
            pod: self.pod.clone(),
            container: container.clone(),
            container_id: view.id.clone(),
            pod_ip: facts.pod_ips.first().map(ToString::to_string).unwrap_or_default(),
            started_at: clock::from_ns(started_at_ns),
        };
        let started = self.observed.probes.get(&view.id).is_some_and(|p| p.started);
        let probes = Probes::begin(&self.shared, &subject, &self.inbox, started);
        self.probes.insert(view.id.clone(), probes);
    }

    /// Says how things stand, decides, acts, says it again if that changed anything. When to wake at the latest.
    fn advance(&mut self) -> Option<Timestamp> {
        let now = clock::now();
        let deadline = self.check_deadline(now);
        self.publish(now);
        let mut plan = plan::next(&self.pod, &self.observed, now);
        if plan.actions.contains(&Action::Finish) && self.observed.ending.is_none() {
            self.end(Ending::Finished);
            plan = plan::next(&self.pod, &self.observed, now);
        }
        for (name, delay) in &plan.crash_looping {
            self.crash_loop(name, *delay, plan.wake_at.unwrap_or(now));
        }
        for action in plan.actions {
            self.act(action, now);
        }
        self.publish(now);
        [plan.wake_at, deadline, self.next_wait(now)].into_iter().flatten().min()
    }

    /// The nearest retry that is still to come.
    fn next_wait(&self, now: Timestamp) -> Option<Timestamp> {
        self.observed.waiting.values().map(|w| w.retry_at).filter(|at| *at > now).min()
    }

    fn check_deadline(&mut self, now: Timestamp) -> Option<Timestamp> {
        let seconds = pod::spec(&self.pod).active_deadline_seconds?;
        let started = self.status.as_ref().and_then(|s| s.start_time.clone())?;
        let at = clock::after(started.0, Duration::from_secs(u64::try_from(seconds).unwrap_or(0)));
        if self.observed.ending.is_some() {
            return None;
        }
        if now < at {
            return Some(at);
        }
        let message = "Pod was active on the node longer than the specified deadline".to_owned();
        self.shared.events.pod(&self.pod, Kind::Normal, "DeadlineExceeded", message);
        self.end(Ending::DeadlineExceeded);
        None
    }

    fn crash_loop(&mut self, name: &str, delay: Duration, retry_at: Timestamp) {
        if self
            .observed
            .waiting
            .get(name)
            .is_some_and(|w| w.reason == "CrashLoopBackOff" && w.retry_at >= retry_at)
        {
            return;
        }
        let message = format!(
            "back-off {} restarting failed container={name} pod={}",
            backoff::go_duration(delay),
            self.id
        );
        self.shared.events.container(
            &self.pod,
            name,
            (Kind::Warning, "BackOff"),
            format!("Back-off restarting failed container {name} in pod {}", self.id),
        );
        let waiting = Waiting { reason: "CrashLoopBackOff".into(), message, retry_at };
        self.observed.waiting.insert(name.to_owned(), waiting);
    }

    /// Nothing of the pod runs any more.
    fn nothing_left(&self) -> bool {
        !self.observed.busy
            && !self.observed.any_running()
            && (self.observed.sandbox.is_none() || self.observed.sandbox_stopped)
    }

    fn over(&self) -> bool {
        self.observed.ending == Some(Ending::Removed) && self.nothing_left()
    }
}

#[cfg(test)]
mod tests;
