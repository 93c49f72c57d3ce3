//! Decides what a pod needs next, from its specification and what was observed. Pure.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, Pod};

use crate::clock;
use crate::observed::{ContainerView, Ending, Observed};
use crate::pod::{self, RestartPolicy};

/// One thing to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Prepare all volumes.
    MountVolumes,
    /// Make a sandbox (after removing the one before).
    CreateSandbox {
        /// How many there were.
        attempt: u32,
    },
    /// Make and start a container.
    Start {
        /// Its name.
        name: String,
        /// Its restart count.
        attempt: u32,
    },
    /// Stop a container.
    Kill {
        /// Its name.
        name: String,
        /// Its id.
        id: String,
        /// The Event's message.
        why: String,
    },
    /// Stop the sandbox: nothing of the pod shall run any more.
    StopSandbox,
    /// The pod has come to its end by itself.
    Finish,
}

/// What to do now, and when to look again at the latest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) actions: Vec<Action>,
    pub(crate) wake_at: Option<Timestamp>,
    /// Containers in crash back-off: name, delay.
    pub(crate) crash_looping: Vec<(String, Duration)>,
}

impl Plan {
    fn one(action: Action) -> Self {
        Self { actions: vec![action], ..Self::default() }
    }

    fn wake(&mut self, at: Timestamp) {
        self.wake_at = Some(self.wake_at.map_or(at, |known| known.min(at)));
    }

    fn wait(at: Timestamp) -> Self {
        Self { wake_at: Some(at), ..Self::default() }
    }
}

/// The next actions. Of volumes, sandbox and starts there is at most one at a time; kills go in parallel.
pub(crate) fn next(pod: &Pod, observed: &Observed, now: Timestamp) -> Plan {
    match &observed.ending {
        Some(ending) => end(pod, observed, ending),
        None => advance(pod, observed, now),
    }
}

/// Stops what runs, main containers first, then sidecars from the last to the first, then the sandbox.
fn end(pod: &Pod, observed: &Observed, ending: &Ending) -> Plan {
    let stop = |name: &str, view: &ContainerView| Action::Kill {
        name: name.to_owned(),
        id: view.id.clone(),
        why: match ending {
            Ending::DeadlineExceeded => {
                "Pod was active on the node longer than the specified deadline".to_owned()
            }
            Ending::Deleted | Ending::Removed | Ending::Rejected { .. } | Ending::Finished => {
                format!("Stopping container {name}")
            }
        },
    };
    let sidecars: Vec<&str> =
        pod::init_containers(pod).iter().filter(|c| pod::is_sidecar(c)).map(|c| c.name.as_str()).collect();
    let mains_running: Vec<_> =
        observed.all().filter(|(name, c)| c.running() && !sidecars.contains(&name.as_str())).collect();
    let waves = if mains_running.is_empty() {
        let last = sidecars
            .iter()
            .rev()
            .find_map(|name| Some((*name, observed.latest(name).filter(|c| c.running())?)));
        last.into_iter().collect()
    } else {
        mains_running.into_iter().map(|(name, c)| (name.as_str(), c)).collect::<Vec<_>>()
    };
    let actions: Vec<_> = waves
        .iter()
        .filter(|(_, c)| !observed.stopping.contains(&c.id))
        .map(|(name, c)| stop(name, c))
        .collect();
    if !waves.is_empty() || observed.busy {
        return Plan { actions, ..Plan::default() };
    }
    if observed.sandbox.is_some() && !observed.sandbox_stopped {
        return Plan::one(Action::StopSandbox);
    }
    Plan::default()
}

fn advance(pod: &Pod, observed: &Observed, now: Timestamp) -> Plan {
    let mut plan = Plan::default();
    kill_unhealthy(pod, observed, &mut plan);
    if observed.busy {
        return plan;
    }
    if !observed.volumes_ready {
        return match observed.volumes_retry_at {
            Some(at) if at > now => Plan::wait(at),
            _ => Plan::one(Action::MountVolumes),
        };
    }
    if !observed.sandbox.as_ref().is_some_and(|s| s.ready) {
        return sandbox(pod, observed, now);
    }
    if !initialized(pod, observed) {
        start_init(pod, observed, now, &mut plan);
        return plan;
    }
    restart_sidecars(pod, observed, now, &mut plan);
    start_main(pod, observed, now, &mut plan);
    plan
}

fn sandbox(pod: &Pod, observed: &Observed, now: Timestamp) -> Plan {
    // The init of a dead sandbox takes its containers along; what is still seen running will be reported soon.
    if observed.any_running() {
        return Plan::default();
    }
    if finished(pod, observed) {
        return Plan::one(Action::Finish);
    }
    if let Some(at) = observed.sandbox_retry_at.filter(|at| *at > now) {
        return Plan::wait(at);
    }
    let attempt = observed.sandbox.as_ref().map_or(0, |s| s.attempt + 1);
    Plan::one(Action::CreateSandbox { attempt })
}

/// All main containers have ended and none is to be started again; or an init container failed for good.
pub(crate) fn finished(pod: &Pod, observed: &Observed) -> bool {
    let over = |container: &Container, init: bool| {
        observed
            .latest(&container.name)
            .and_then(ContainerView::exit)
            .is_some_and(|exit| !restarts(pod::container_policy(pod, container, init), exit.code))
    };
    let init_failed = pod::init_containers(pod).iter().any(|c| {
        !pod::is_sidecar(c)
            && over(c, true)
            && observed.latest(&c.name).and_then(ContainerView::exit).is_some_and(|exit| exit.code != 0)
    });
    init_failed || (!pod::containers(pod).is_empty() && pod::containers(pod).iter().all(|c| over(c, false)))
}

fn restarts(policy: RestartPolicy, code: i32) -> bool {
    match policy {
        RestartPolicy::Always => true,
        RestartPolicy::OnFailure => code != 0,
        RestartPolicy::Never => false,
    }
}

/// Kills containers whose probes gave them up or whose definition changed.
fn kill_unhealthy(pod: &Pod, observed: &Observed, plan: &mut Plan) {
    for (container, init) in pod::all_containers(pod) {
        if init && !pod::is_sidecar(container) {
            continue;
        }
        let Some(view) = observed.current(&container.name).filter(|c| c.running()) else { continue };
        if observed.stopping.contains(&view.id) {
            continue;
        }
        let probes = observed.probes.get(&view.id).copied().unwrap_or_default();
        let name = &container.name;
        let why = if !view.hash.is_empty() && view.hash != pod::container_hash(container) {
            format!("Container {name} definition changed, will be restarted")
        } else if probes.liveness_failed {
            format!("Container {name} failed liveness probe, will be restarted")
        } else if probes.startup_failed {
            format!("Container {name} failed startup probe, will be restarted")
        } else {
            continue;
        };
        plan.actions.push(Action::Kill { name: name.clone(), id: view.id.clone(), why });
    }
}

/// Whether the init containers have done their work in this sandbox.
pub(crate) fn initialized(pod: &Pod, observed: &Observed) -> bool {
    pod::containers(pod).iter().any(|c| observed.current(&c.name).is_some())
        || pod::init_containers(pod).iter().all(|c| init_done(observed, c))
}

fn init_done(observed: &Observed, container: &Container) -> bool {
    let Some(view) = observed.current(&container.name) else { return false };
    if pod::is_sidecar(container) {
        view.running() && started(observed, container, view)
    } else {
        view.exit().is_some_and(|exit| exit.code == 0)
    }
}

/// The startup probe, if there is one, has succeeded.
pub(crate) fn started(observed: &Observed, container: &Container, view: &ContainerView) -> bool {
    view.running()
        && (container.startup_probe.is_none() || observed.probes.get(&view.id).is_some_and(|p| p.started))
}

fn start_init(pod: &Pod, observed: &Observed, now: Timestamp, plan: &mut Plan) {
    for container in pod::init_containers(pod) {
        if init_done(observed, container) {
            continue;
        }
        if finished(pod, observed) {
            plan.actions.push(Action::Finish);
            return;
        }
        consider(pod, container, true, (observed, now), plan);
        // A sidecar that has ended again does not hold up those after it once it had started; one that never
        // started does, and so does every ordinary init container.
        return;
    }
}

fn restart_sidecars(pod: &Pod, observed: &Observed, now: Timestamp, plan: &mut Plan) {
    for container in pod::init_containers(pod).iter().filter(|c| pod::is_sidecar(c)) {
        if finished(pod, observed) {
            return;
        }
        consider(pod, container, true, (observed, now), plan);
    }
}

fn start_main(pod: &Pod, observed: &Observed, now: Timestamp, plan: &mut Plan) {
    if finished(pod, observed) {
        if !pod::containers(pod).iter().any(|c| observed.latest(&c.name).is_some_and(ContainerView::running))
        {
            plan.actions.push(Action::Finish);
        }
        return;
    }
    for container in pod::containers(pod) {
        consider(pod, container, false, (observed, now), plan);
    }
}

/// Starts the container, waits for its delay, or leaves it alone.
fn consider(
    pod: &Pod,
    container: &Container,
    init: bool,
    (observed, now): (&Observed, Timestamp),
    plan: &mut Plan,
) {
    let starting = plan.actions.iter().any(|a| matches!(a, Action::Start { .. }));
    if let Some(waiting) = observed.waiting.get(&container.name).filter(|w| w.retry_at > now) {
        plan.wake(waiting.retry_at);
        return;
    }
    let latest = observed.latest(&container.name);
    if latest.is_some_and(ContainerView::running) {
        return;
    }
    if let Some((view, exit)) = latest.and_then(|view| Some((view, view.exit()?))) {
        let same_sandbox = observed.current(&container.name).is_some();
        // In a new sandbox every init container runs again.
        if (same_sandbox || !init) && !restarts(pod::container_policy(pod, container, init), exit.code) {
            return;
        }
        let finished_at = clock::from_ns(exit.finished_at_ns);
        if observed.stopping.contains(&view.id) {
            return;
        }
        if let Some((end, delay)) = observed.crashes.waiting(&container.name, finished_at, now) {
            plan.crash_looping.push((container.name.clone(), delay));
            plan.wake(end);
            return;
        }
    }
    if !starting {
        plan.actions.push(Action::Start {
            name: container.name.clone(),
            attempt: next_attempt(pod, observed, container),
        });
    }
}

/// The restart count of the next attempt; the API's count is heeded in case the runtime's records are lost.
fn next_attempt(pod: &Pod, observed: &Observed, container: &Container) -> u32 {
    if let Some(view) = observed.latest(&container.name) {
        // One that was made but never started (the agent died in between) is replaced under its own number.
        let started = !matches!(view.state, weft_agent_runtime::ContainerState::Created);
        return view.attempt + u32::from(started);
    }
    let known = pod.status.iter().flat_map(|s| {
        s.container_statuses.iter().flatten().chain(s.init_container_statuses.iter().flatten())
    });
    known
        .filter(|s| s.name == container.name && s.container_id.as_deref().is_some_and(|id| !id.is_empty()))
        .filter_map(|s| u32::try_from(s.restart_count).ok())
        .map(|count| count + 1)
        .max()
        .unwrap_or(0)
}

#[cfg(test)]
mod tests;
