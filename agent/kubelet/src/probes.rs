//! Probes of running containers: one task per probe, which reports only changed verdicts to the pod's worker.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, Pod, Probe};
use tokio::sync::watch;
use tokio::task::AbortHandle;

use crate::clock;
use crate::events::Kind as EventKind;
use crate::hooks;
use crate::http_get::{self, Target};
use crate::shared::Shared;
use crate::worker::{Inbox, Message};

/// Which probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    Startup,
    Readiness,
    Liveness,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Startup => "Startup",
            Self::Readiness => "Readiness",
            Self::Liveness => "Liveness",
        }
    }

    fn metric(self) -> &'static str {
        match self {
            Self::Startup => "startup",
            Self::Readiness => "readiness",
            Self::Liveness => "liveness",
        }
    }
}

/// A changed verdict.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Verdict {
    pub(crate) container_id: String,
    pub(crate) kind: Kind,
    pub(crate) good: bool,
}

/// What is probed.
#[derive(Clone)]
pub(crate) struct Subject {
    pub(crate) pod: Arc<Pod>,
    pub(crate) container: Container,
    pub(crate) container_id: String,
    pub(crate) pod_ip: String,
    pub(crate) started_at: jiff::Timestamp,
}

/// The running probes of one container; dropping them ends them.
pub(crate) struct Probes {
    tasks: Vec<AbortHandle>,
    liveness: Vec<AbortHandle>,
    started: watch::Sender<bool>,
}

impl Drop for Probes {
    fn drop(&mut self) {
        self.tasks.iter().chain(&self.liveness).for_each(AbortHandle::abort);
    }
}

impl Probes {
    /// Begins all probes of a container. `started` says that an earlier kubelet saw the startup probe succeed.
    pub(crate) fn begin(shared: &Arc<Shared>, subject: &Subject, inbox: &Inbox, started: bool) -> Self {
        let container = &subject.container;
        let begun = watch::Sender::new(started || container.startup_probe.is_none());
        let mut probes = Self { tasks: Vec::new(), liveness: Vec::new(), started: begun };
        let list = [
            (Kind::Startup, &container.startup_probe),
            (Kind::Readiness, &container.readiness_probe),
            (Kind::Liveness, &container.liveness_probe),
        ];
        for (kind, probe) in list {
            let Some(probe) = probe.clone() else { continue };
            if kind == Kind::Startup && started {
                continue;
            }
            let task = Task {
                shared: shared.clone(),
                subject: subject.clone(),
                inbox: inbox.clone(),
                kind,
                probe,
                started: probes.started.subscribe(),
            };
            let handle = tokio::spawn(task.run()).abort_handle();
            if kind == Kind::Readiness { probes.tasks.push(handle) } else { probes.liveness.push(handle) }
        }
        probes
    }

    /// The startup probe has succeeded: the others begin.
    pub(crate) fn set_started(&self) {
        self.started.send_replace(true);
    }

    /// The pod is ending: only readiness goes on.
    pub(crate) fn end_liveness(&self) {
        self.liveness.iter().for_each(AbortHandle::abort);
    }
}

/// Thresholds applied to results. Pure.
#[derive(Debug)]
struct Counter {
    success_threshold: i32,
    failure_threshold: i32,
    last: Option<bool>,
    run: i32,
    verdict: Option<bool>,
}

impl Counter {
    fn of(probe: &Probe) -> Self {
        Self {
            success_threshold: probe.success_threshold.unwrap_or(1).max(1),
            failure_threshold: probe.failure_threshold.unwrap_or(3).max(1),
            last: None,
            run: 0,
            verdict: None,
        }
    }

    /// Takes a result; the verdict if it changed by it.
    fn take(&mut self, good: bool) -> Option<bool> {
        self.run = if self.last == Some(good) { self.run.saturating_add(1) } else { 1 };
        self.last = Some(good);
        let threshold = if good { self.success_threshold } else { self.failure_threshold };
        if self.run < threshold || self.verdict == Some(good) {
            return None;
        }
        self.verdict = Some(good);
        self.verdict
    }
}

struct Task {
    shared: Arc<Shared>,
    subject: Subject,
    inbox: Inbox,
    kind: Kind,
    probe: Probe,
    started: watch::Receiver<bool>,
}

enum Outcome {
    Good,
    Bad(String),
    /// The probe itself could not be carried out.
    Errored(String),
}

impl Task {
    async fn run(mut self) {
        if self.kind != Kind::Startup && self.started.wait_for(|started| *started).await.is_err() {
            return;
        }
        let seconds = |value: Option<i32>, default: u64, least: u64| {
            Duration::from_secs(value.and_then(|v| u64::try_from(v).ok()).unwrap_or(default).max(least))
        };
        let first = clock::after(self.subject.started_at, seconds(self.probe.initial_delay_seconds, 0, 0));
        tokio::time::sleep(clock::until(first, clock::now())).await;
        let mut ticks = tokio::time::interval(seconds(self.probe.period_seconds, 10, 1));
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let timeout = seconds(self.probe.timeout_seconds, 1, 1);
        let mut counter = Counter::of(&self.probe);
        loop {
            ticks.tick().await;
            let outcome = self.once(timeout).await;
            let good = matches!(outcome, Outcome::Good);
            self.shared.metrics.probe(self.kind.metric(), good);
            self.record(outcome);
            let Some(verdict) = counter.take(good) else { continue };
            let message =
                Verdict { container_id: self.subject.container_id.clone(), kind: self.kind, good: verdict };
            if self.inbox.send(Message::Probe(message)).await.is_err()
                || (self.kind == Kind::Startup && verdict)
            {
                return;
            }
        }
    }

    fn record(&self, outcome: Outcome) {
        let message = match outcome {
            Outcome::Good => return,
            Outcome::Bad(message) => format!("{} probe failed: {message}", self.kind.name()),
            Outcome::Errored(message) => format!("{} probe errored: {message}", self.kind.name()),
        };
        let about = (EventKind::Warning, "Unhealthy");
        self.shared.events.container(&self.subject.pod, &self.subject.container.name, about, message);
    }

    async fn once(&self, timeout: Duration) -> Outcome {
        let subject = &self.subject;
        if let Some(exec) = &self.probe.exec {
            let command = exec.command.clone().unwrap_or_default();
            let run = hooks::run_command(&self.shared.runtime, &subject.container_id, command.clone());
            return match tokio::time::timeout(timeout, run).await {
                Ok(Ok((0, _))) => Outcome::Good,
                Ok(Ok((_, output))) => Outcome::Bad(output),
                Ok(Err(error)) => Outcome::Errored(error.to_string()),
                Err(_) => Outcome::Bad(format!(
                    "command timed out: {:?} timed out after {}s",
                    command.join(" "),
                    timeout.as_secs()
                )),
            };
        }
        if let Some(action) = &self.probe.http_get {
            let Some(target) = Target::of(&subject.pod, &subject.container.name, action, &subject.pod_ip)
            else {
                return Outcome::Errored(format!("couldn't find port: {}", port_text(&action.port)));
            };
            return match http_get::get(&target, timeout).await {
                Ok(answer) if (200..400).contains(&answer.code) => Outcome::Good,
                Ok(answer) => Outcome::Bad(format!("HTTP probe failed with statuscode: {}", answer.code)),
                Err(error) => Outcome::Bad(error),
            };
        }
        if let Some(action) = &self.probe.tcp_socket {
            let Some(port) = http_get::port(&subject.pod, &subject.container.name, &action.port) else {
                return Outcome::Errored(format!("couldn't find port: {}", port_text(&action.port)));
            };
            let host =
                action.host.clone().filter(|h| !h.is_empty()).unwrap_or_else(|| subject.pod_ip.clone());
            return match tokio::time::timeout(timeout, http_get::dial(&host, port)).await {
                Ok(Ok(_)) => Outcome::Good,
                Ok(Err(error)) => Outcome::Bad(error),
                Err(_) => Outcome::Bad(format!("dial tcp {}: i/o timeout", http_get::authority(&host, port))),
            };
        }
        if self.probe.grpc.is_some() {
            return Outcome::Errored("gRPC probes are not supported by this kubelet".to_owned());
        }
        Outcome::Errored(format!("missing probe handler for {}", subject.container.name))
    }
}

fn port_text(port: &k8s_openapi::apimachinery::pkg::util::intstr::IntOrString) -> String {
    use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
    match port {
        IntOrString::Int(number) => number.to_string(),
        IntOrString::String(name) => name.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdicts_change_only_at_the_thresholds() {
        let probe = Probe { success_threshold: Some(2), failure_threshold: Some(3), ..Probe::default() };
        let mut counter = Counter::of(&probe);
        let verdicts: Vec<_> = [true, true, true, false, false, true, false, false, false, false, true, true]
            .into_iter()
            .map(|good| counter.take(good))
            .collect();
        let none = None;
        assert_eq!(
            verdicts,
            [none, Some(true), none, none, none, none, none, none, Some(false), none, none, Some(true)]
        );
    }
}
