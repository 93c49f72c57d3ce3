//! The steps of a worker: how they are begun, and what their ends mean.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use tokio::task::JoinSet;

use super::{CONFIG_RETRY, Done, Message, OLDER_KEPT, RETRY_FIRST, RETRY_MAX, Worker};
use crate::clock;
use crate::events::Kind;
use crate::gate;
use crate::observed::{ContainerView, Ending, SandboxView, Waiting};
use crate::plan::Action;
use crate::pod;
use crate::spec;
use crate::start::{self, Failure};
use crate::terminating;
use crate::volumes;
use weft_agent_runtime::chain;

impl Worker {
    /// Begins an action. Forward steps set `busy` until they are done.
    pub(super) fn act(&mut self, action: Action, now: Timestamp) {
        match action {
            Action::MountVolumes => {
                let facts = start::facts(&self.shared, &self.pod, None);
                let job = volumes::prepare(self.shared.clone(), self.pod.clone(), facts);
                self.begin(true, async move { Done::Mounted(job.await) });
            }
            Action::CreateSandbox { attempt } => self.create_sandbox(attempt),
            Action::Start { name, attempt } => self.start(&name, attempt, now),
            Action::Kill { name, id, why } => self.kill(name, id, why),
            Action::StopSandbox => {
                let Some(sandbox) = &self.observed.sandbox else { return };
                let (runtime, id) = (self.shared.runtime.clone(), sandbox.id.clone());
                self.begin(false, async move { Done::SandboxStopped(runtime.stop_sandbox(&id).await) });
            }
            Action::Finish => {}
        }
    }

    fn begin(&mut self, may_stop: bool, job: impl Future<Output = Done> + Send + 'static) {
        self.observed.busy = true;
        self.step_may_stop = may_stop;
        self.step = Some(self.jobs.spawn(job));
    }

    fn create_sandbox(&mut self, attempt: u32) {
        let (shared, pod) = (self.shared.clone(), self.pod.clone());
        let old = self.observed.sandbox.as_ref().map(|s| s.id.clone());
        self.begin(false, async move {
            if let Some(old) = old
                && let Err(error) = shared.runtime.stop_sandbox(&old).await
            {
                return Done::Sandbox(Err(error));
            }
            // A node without a resolv.conf has no names outside the cluster to offer.
            let host = tokio::fs::read_to_string(&shared.config.host_resolv_conf).await.unwrap_or_default();
            let spec = match spec::sandbox(&pod, &shared.config, attempt, &host) {
                Ok(spec) => spec,
                Err(error) => return Done::Sandbox(Err(error)),
            };
            Done::Sandbox(match shared.runtime.run_sandbox(spec).await {
                Ok(sandbox) => gate::pass(&shared, &pod, sandbox).await,
                Err(error) => Err(error),
            })
        });
    }

    fn start(&mut self, name: &str, attempt: u32, now: Timestamp) {
        let Some((container, _)) = pod::find_container(&self.pod, name) else { return };
        let (container, Some(sandbox)) = (container.clone(), self.observed.sandbox.clone()) else { return };
        let image = container.image.clone().unwrap_or_default();
        if self.image_backing_off(name, &image, now) {
            return;
        }
        if let Some(exit) = self.observed.latest(name).and_then(ContainerView::exit) {
            let finished = clock::from_ns(exit.finished_at_ns);
            self.observed.crashes.next(name, finished, now);
        }
        let replaces =
            self.observed.latest(name).filter(|c| !c.running() && c.exit().is_none()).map(|c| c.id.clone());
        if let Some(stale) = &replaces {
            let list = self.observed.containers.entry(name.to_owned()).or_default();
            list.retain(|c| c.id != *stale);
        }
        let order = start::Order {
            pod: self.pod.clone(),
            container,
            attempt,
            sandbox,
            mounted: self.mounted.clone(),
            replaces,
            running: self.inbox.clone(),
        };
        let (shared, name) = (self.shared.clone(), name.to_owned());
        self.begin(false, async move { Done::Started { name, result: start::run(shared, order).await } });
    }

    /// A missing image is asked for again only after its delay; meanwhile the container waits with upstream's reason.
    fn image_backing_off(&mut self, name: &str, image: &str, now: Timestamp) -> bool {
        let Some(waiting) = self.observed.waiting.get(name).filter(|w| w.reason == "ErrImagePull").cloned()
        else {
            return false;
        };
        let retry_at = clock::after(now, self.observed.images.delay(image));
        let text = format!("Back-off pulling image \"{image}\"");
        self.shared.events.container(&self.pod, name, (Kind::Normal, "BackOff"), text.clone());
        self.shared.events.container(
            &self.pod,
            name,
            (Kind::Warning, "Failed"),
            "Error: ImagePullBackOff".to_owned(),
        );
        let message = format!("{text}: ErrImagePull: {}", waiting.message);
        self.observed
            .waiting
            .insert(name.to_owned(), Waiting { reason: "ImagePullBackOff".into(), message, retry_at });
        true
    }

    fn kill(&mut self, name: String, id: String, why: String) {
        self.observed.stopping.insert(id.clone());
        let facts = start::facts(&self.shared, &self.pod, self.observed.sandbox.as_ref());
        let probe_grace = self.probe_grace(&name, &id);
        let grace = match probe_grace {
            Some(grace) if self.observed.ending.is_none() => {
                tokio::sync::watch::Sender::new(grace).subscribe()
            }
            _ => self.grace.subscribe(),
        };
        let order = terminating::Order {
            pod: self.pod.clone(),
            name: name.clone(),
            id: id.clone(),
            why,
            pod_ip: facts.pod_ips.first().map(ToString::to_string).unwrap_or_default(),
            grace,
        };
        let shared = self.shared.clone();
        self.jobs.spawn(async move {
            terminating::kill(shared.clone(), order).await;
            let view = terminating::look(&shared.runtime, &id).await;
            Done::Killed { name, id, view }
        });
    }

    /// The grace that a failed probe sets for itself.
    fn probe_grace(&self, name: &str, id: &str) -> Option<Duration> {
        let state = self.observed.probes.get(id)?;
        let (container, _) = pod::find_container(&self.pod, name)?;
        let probe = if state.liveness_failed {
            container.liveness_probe.as_ref()?
        } else if state.startup_failed {
            container.startup_probe.as_ref()?
        } else {
            return None;
        };
        u64::try_from(probe.termination_grace_period_seconds?).ok().map(Duration::from_secs)
    }

    /// A job has ended.
    pub(super) async fn finished(&mut self, done: Result<Done, tokio::task::JoinError>) {
        let done = match done {
            Ok(done) => done,
            Err(error) if error.is_cancelled() => return,
            Err(error) => {
                // A panic in a step is a defect; the pod is not left hanging for it.
                tracing::error!(pod = %self.id, %error, "a step of a pod's worker panicked");
                self.observed.busy = false;
                self.observed.volumes_retry_at = Some(self.retry_at());
                return;
            }
        };
        match done {
            Done::Mounted(result) => self.mounted(result),
            Done::Sandbox(result) => self.sandbox_made(result),
            Done::Started { name, result } => self.started(&name, result),
            Done::Killed { name, id, view } => {
                self.observed.stopping.remove(&id);
                self.probes.remove(&id);
                self.killed(&name, &id, view);
            }
            Done::SandboxStopped(Ok(())) => {
                self.observed.busy = false;
                self.observed.sandbox_stopped = true;
                self.look_at_all().await;
            }
            Done::SandboxStopped(Err(error)) => {
                self.observed.busy = false;
                let message = format!("error killing pod: {}", chain(&error));
                self.shared.events.pod(&self.pod, Kind::Warning, "FailedKillPod", message);
                let (runtime, id) =
                    (self.shared.runtime.clone(), self.observed.sandbox.as_ref().map(|s| s.id.clone()));
                let delay = self.next_delay();
                self.begin(false, async move {
                    tokio::time::sleep(delay).await;
                    match id {
                        Some(id) => Done::SandboxStopped(runtime.stop_sandbox(&id).await),
                        None => Done::SandboxStopped(Ok(())),
                    }
                });
            }
            Done::ObjectChanged(name) => {
                if let Some(waiting) =
                    self.observed.waiting.get_mut(&name).filter(|w| w.reason == "CreateContainerConfigError")
                {
                    waiting.retry_at = clock::now();
                }
            }
            Done::Pruned => {}
        }
    }

    fn next_delay(&mut self) -> Duration {
        let delay = RETRY_FIRST.saturating_mul(1 << self.failures.min(10)).min(RETRY_MAX);
        self.failures += 1;
        delay
    }

    fn retry_at(&mut self) -> Timestamp {
        let delay = self.next_delay();
        clock::after(clock::now(), delay)
    }

    fn mounted(&mut self, result: Result<volumes::Mounted, volumes::Error>) {
        self.observed.busy = false;
        match result {
            Ok(mounted) => {
                self.failures = 0;
                self.mounted = Arc::new(mounted);
                self.observed.volumes_ready = true;
                let mut keeper = JoinSet::new();
                let pod = self.keeper_pod.subscribe();
                keeper.spawn(volumes::keep::run(self.shared.clone(), pod, self.handles.clone()));
                self.keeper = Some(keeper);
            }
            Err(error) => {
                self.shared.events.pod(&self.pod, Kind::Warning, "FailedMount", error.to_string());
                tracing::warn!(pod = %self.id, %error, "cannot prepare volume");
                self.observed.volumes_retry_at = Some(self.retry_at());
            }
        }
    }

    fn sandbox_made(&mut self, result: Result<weft_agent_runtime::Sandbox, weft_agent_runtime::Error>) {
        self.observed.busy = false;
        match result {
            Ok(sandbox) => {
                self.failures = 0;
                self.shared.metrics.started_pods.inc();
                let old = self.observed.sandbox.replace(SandboxView::from(&sandbox));
                self.older.extend(old.map(|s| s.id));
                self.forget_older();
            }
            Err(error) => {
                let message = format!("Failed to create pod sandbox: {}", chain(&error));
                self.shared.events.pod(&self.pod, Kind::Warning, "FailedCreatePodSandBox", message);
                tracing::warn!(pod = %self.id, error = %chain(&error), "cannot make sandbox");
                self.observed.sandbox_retry_at = Some(self.retry_at());
            }
        }
    }

    /// Removes the records of sandboxes that were replaced long ago.
    fn forget_older(&mut self) {
        while self.older.len() > OLDER_KEPT {
            let Some(id) = self.older.pop_front() else { return };
            for list in self.observed.containers.values_mut() {
                list.retain(|c| c.sandbox_id != id);
            }
            let runtime = self.shared.runtime.clone();
            self.jobs.spawn(async move {
                // What stays is removed as an orphan at the next start.
                let _ = runtime.remove_sandbox(&id).await;
                Done::Pruned
            });
        }
    }

    fn started(&mut self, name: &str, result: Result<ContainerView, Failure>) {
        self.observed.busy = false;
        match result {
            Ok(view) => {
                self.observed.waiting.remove(name);
                if let Some(image) = pod::find_container(&self.pod, name).and_then(|(c, _)| c.image.clone()) {
                    self.observed.images.forget(&image);
                }
                self.begin_probes(name, &view);
                let id = view.id.clone();
                self.observed.record(name, view);
                // It may have ended before anybody listened for it under its name.
                self.inbox.offer(Message::Exited(id));
                self.prune(name);
            }
            Err(failure) => self.start_failed(name, failure),
        }
    }

    fn start_failed(&mut self, name: &str, failure: Failure) {
        let now = clock::now();
        let retry_at = match failure.reason.as_str() {
            "ErrImagePull" => {
                let image = pod::find_container(&self.pod, name)
                    .and_then(|(c, _)| c.image.clone())
                    .unwrap_or_default();
                self.observed.images.next(&image, now, now);
                // Upstream's next look at the pod finds the image in back-off.
                clock::after(now, RETRY_FIRST)
            }
            _ if failure.view.is_some() => now,
            _ => clock::after(now, CONFIG_RETRY),
        };
        tracing::warn!(pod = %self.id, container = name, reason = failure.reason, error = failure.message, "cannot start container");
        if let Some(view) = failure.view {
            self.observed.record(name, view);
            self.prune(name);
        }
        let waiting = Waiting { reason: failure.reason, message: failure.message, retry_at };
        self.observed.waiting.insert(name.to_owned(), waiting);
        if retry_at > now {
            self.retry_on_change(name.to_owned());
        }
    }

    /// A container that waits for a ConfigMap or Secret is tried again as soon as one changes.
    fn retry_on_change(&mut self, name: String) {
        let mut states: Vec<_> = self.handles.iter().map(crate::objects::Handle::changes).collect();
        if states.is_empty() {
            return;
        }
        self.jobs.spawn(async move {
            let changes = states.iter_mut().map(|s| Box::pin(s.changed()));
            // The time limit is the ordinary retry: no watcher outlives its reason.
            let _ = tokio::time::timeout(CONFIG_RETRY, futures::future::select_all(changes)).await;
            Done::ObjectChanged(name)
        });
    }

    fn killed(&mut self, name: &str, id: &str, view: Option<ContainerView>) {
        if let Some(view) = view {
            self.observed.record(name, view);
            return;
        }
        // The runtime has forgotten it: it can't be running.
        let list = self.observed.containers.entry(name.to_owned()).or_default();
        list.retain(|c| c.id != id);
        if self.observed.ending == Some(Ending::Deleted) {
            tracing::debug!(pod = %self.id, container = name, "container was gone before it was stopped");
        }
    }

    /// Keeps the newest attempt and the one before; older ones go, with their logs.
    fn prune(&mut self, name: &str) {
        let Some(list) = self.observed.containers.get_mut(name) else { return };
        if list.len() <= 2 {
            return;
        }
        let old: Vec<_> = list.drain(..list.len() - 2).collect();
        let logs = self.shared.config.pod_log_dir.join(self.id.log_folder());
        for view in old {
            self.observed.probes.remove(&view.id);
            let (runtime, log) = (self.shared.runtime.clone(), logs.join(spec::log_path(name, view.attempt)));
            self.jobs.spawn(async move {
                // Both are found again by the clean-up of the pod if they fail now.
                let _ = runtime.remove_container(&view.id).await;
                let _ = tokio::fs::remove_file(log).await;
                Done::Pruned
            });
        }
    }
}
