//! What the API server shall see of a pod: phase, conditions, containers. Pure.

use std::net::IpAddr;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{
    Container, ContainerState, ContainerStateRunning, ContainerStateTerminated, ContainerStateWaiting,
    ContainerStatus, HostIP, Pod, PodIP, PodStatus,
};
use weft_agent_runtime as runtime;

use crate::clock;
use crate::observed::{ContainerView, Ending, Observed};
use crate::plan;
use crate::pod::{self, RestartPolicy};
use crate::resources;

mod conditions;

/// How container ids are written.
pub(crate) const ID_SCHEME: &str = "weft://";

/// The conditions that the kubelet writes.
pub(crate) const OWN_CONDITIONS: [&str; 5] =
    ["PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady", "PodScheduled"];

/// The status of a pod as it is now. `old` is the last one known; times of unchanged conditions come from it.
pub(crate) fn generate(pod: &Pod, observed: &Observed, node_ips: &[IpAddr], now: Timestamp) -> PodStatus {
    let old = pod.status.clone().unwrap_or_default();
    if let Some(Ending::Rejected { reason, message }) = &observed.ending {
        return rejected(pod, old, (reason, message), now);
    }
    let init: Vec<_> =
        pod::init_containers(pod).iter().map(|c| container_status(pod, observed, c, true)).collect();
    let main: Vec<_> =
        pod::containers(pod).iter().map(|c| container_status(pod, observed, c, false)).collect();
    let deadline = observed.ending == Some(Ending::DeadlineExceeded);
    let phase = if deadline {
        "Failed".to_owned()
    } else {
        never_back(&old, phase(pod, observed, &init, &main, pod::is_terminal(pod)))
    };
    let (reason, message) = if deadline {
        (
            Some("DeadlineExceeded".to_owned()),
            Some("Pod was active on the node longer than the specified deadline".to_owned()),
        )
    } else {
        (old.reason.clone(), old.message.clone())
    };
    let generation = pod.metadata.generation;
    let conditions = conditions::generate(
        pod,
        observed,
        &conditions::Inputs { phase: &phase, init: &init, main: &main, old: &old, now },
    );
    let pod_ips = pod_ips(pod, observed, node_ips, &old);
    let host_ips: Vec<_> = node_ips.iter().map(|ip| HostIP { ip: ip.to_string() }).collect();
    PodStatus {
        phase: Some(phase),
        reason,
        message,
        conditions: Some(conditions),
        host_ip: host_ips.first().map(|host| host.ip.clone()),
        host_ips: Some(host_ips),
        pod_ip: pod_ips.first().cloned(),
        pod_ips: (!pod_ips.is_empty()).then(|| pod_ips.into_iter().map(|ip| PodIP { ip }).collect()),
        start_time: old.start_time.clone().or_else(|| Some(clock::seconds(now))),
        qos_class: Some(resources::qos(pod).name().to_owned()),
        init_container_statuses: (!init.is_empty()).then_some(init),
        container_statuses: Some(main),
        observed_generation: generation,
        ..old
    }
}

fn rejected(pod: &Pod, old: PodStatus, (reason, message): (&str, &str), now: Timestamp) -> PodStatus {
    PodStatus {
        phase: Some("Failed".into()),
        reason: Some(reason.to_owned()),
        message: Some(message.to_owned()),
        start_time: old.start_time.clone().or_else(|| Some(clock::seconds(now))),
        qos_class: Some(resources::qos(pod).name().to_owned()),
        observed_generation: pod.metadata.generation,
        ..old
    }
}

/// A pod that has ended stays ended, whatever is seen later.
fn never_back(old: &PodStatus, phase: &str) -> String {
    match old.phase.as_deref() {
        Some(ended @ ("Succeeded" | "Failed")) => ended.to_owned(),
        _ => phase.to_owned(),
    }
}

fn pod_ips(pod: &Pod, observed: &Observed, node_ips: &[IpAddr], old: &PodStatus) -> Vec<String> {
    let written = |ips: &[IpAddr]| ips.iter().map(ToString::to_string).collect();
    match (&observed.sandbox, node_ips) {
        (Some(_), _) if pod::host_network(pod) => written(node_ips),
        (Some(sandbox), [primary, ..]) if !sandbox.ips.is_empty() && !pod::host_network(pod) => {
            written(&pod::ordered_ips(&sandbox.ips, *primary))
        }
        // A pod that has ended keeps the addresses that it had.
        _ => known_ips(old),
    }
}

fn known_ips(old: &PodStatus) -> Vec<String> {
    old.pod_ips.iter().flatten().map(|ip| ip.ip.clone()).collect()
}

/// The status of one container.
fn container_status(pod: &Pod, observed: &Observed, container: &Container, init: bool) -> ContainerStatus {
    let old = old_status(pod, &container.name, init);
    let latest = observed.latest(&container.name);
    let waiting = observed.waiting.get(&container.name).map(|w| ContainerState {
        waiting: Some(ContainerStateWaiting {
            reason: Some(w.reason.clone()),
            message: non_empty(&w.message),
        }),
        ..ContainerState::default()
    });
    let Some(view) = latest else { return unseen(pod, observed, container, (init, waiting, old)) };
    let restarting = waiting.filter(|_| !view.running());
    let (state, last_state) = match restarting {
        Some(waiting) => (waiting, view.exit().map(|exit| terminated(view, exit))),
        None => {
            (state_of(view), observed.previous(&container.name).and_then(|p| Some(terminated(p, p.exit()?))))
        }
    };
    let last_state = last_state.or_else(|| old.and_then(|o| o.last_state.clone()));
    let started = plan::started(observed, container, view)
        || (init && view.exit().is_some_and(|e| e.code == 0) && !pod::is_sidecar(container));
    let ready = if init && !pod::is_sidecar(container) {
        view.exit().is_some_and(|exit| exit.code == 0)
    } else {
        is_ready(observed, container, view)
    };
    ContainerStatus {
        name: container.name.clone(),
        image: view.image.clone(),
        image_id: view.image_id.clone(),
        container_id: Some(format!("{ID_SCHEME}{}", view.id)),
        ready,
        started: Some(started && view.running()),
        restart_count: i32::try_from(view.attempt).unwrap_or(i32::MAX),
        state: Some(state),
        last_state,
        resources: container.resources.clone(),
        allocated_resources: container
            .resources
            .as_ref()
            .and_then(|r| r.requests.clone())
            .filter(|r| !r.is_empty()),
        ..ContainerStatus::default()
    }
}

/// Running, started, and its readiness probe (if any) says yes.
fn is_ready(observed: &Observed, container: &Container, view: &ContainerView) -> bool {
    if !view.running() || !plan::started(observed, container, view) {
        return false;
    }
    container.readiness_probe.is_none()
        || observed.probes.get(&view.id).and_then(|p| p.ready).unwrap_or(false)
}

/// A container of which the runtime knows nothing (yet, or any more).
fn unseen(
    pod: &Pod,
    observed: &Observed,
    container: &Container,
    (init, waiting, old): (bool, Option<ContainerState>, Option<&ContainerStatus>),
) -> ContainerStatus {
    let ended = pod::is_terminal(pod) || observed.ending.is_some();
    if let Some(old) = old.filter(|o| ended && o.container_id.as_deref().is_some_and(|id| !id.is_empty())) {
        return lost(old.clone());
    }
    let pending_init = !init && !pod::init_containers(pod).is_empty();
    let default = ContainerState {
        waiting: Some(ContainerStateWaiting {
            reason: Some(if pending_init { "PodInitializing" } else { "ContainerCreating" }.to_owned()),
            message: None,
        }),
        ..ContainerState::default()
    };
    ContainerStatus {
        name: container.name.clone(),
        image: container.image.clone().unwrap_or_default(),
        ready: false,
        started: Some(false),
        restart_count: old.map_or(0, |o| o.restart_count),
        last_state: old.and_then(|o| o.last_state.clone()),
        state: Some(waiting.unwrap_or(default)),
        resources: container.resources.clone(),
        allocated_resources: container
            .resources
            .as_ref()
            .and_then(|r| r.requests.clone())
            .filter(|r| !r.is_empty()),
        ..ContainerStatus::default()
    }
}

/// Keeps what was reported of an ended container; one that was last seen running ended unseen.
fn lost(mut status: ContainerStatus) -> ContainerStatus {
    status.ready = false;
    status.started = Some(false);
    if status.state.as_ref().is_none_or(|s| s.terminated.is_none()) {
        status.state = Some(ContainerState {
            terminated: Some(ContainerStateTerminated {
                exit_code: 137,
                reason: Some("ContainerStatusUnknown".into()),
                message: Some("The container could not be located when the pod was terminated".into()),
                ..ContainerStateTerminated::default()
            }),
            ..ContainerState::default()
        });
    }
    status
}

fn old_status<'a>(pod: &'a Pod, name: &str, init: bool) -> Option<&'a ContainerStatus> {
    let status = pod.status.as_ref()?;
    let list = if init { &status.init_container_statuses } else { &status.container_statuses };
    list.iter().flatten().find(|s| s.name == name)
}

fn non_empty(text: &str) -> Option<String> {
    (!text.is_empty()).then(|| text.to_owned())
}

fn state_of(view: &ContainerView) -> ContainerState {
    match &view.state {
        runtime::ContainerState::Created => ContainerState {
            waiting: Some(ContainerStateWaiting { reason: Some("ContainerCreating".into()), message: None }),
            ..ContainerState::default()
        },
        runtime::ContainerState::Running { started_at_ns } => ContainerState {
            running: Some(ContainerStateRunning {
                started_at: Some(clock::seconds(clock::from_ns(*started_at_ns))),
            }),
            ..ContainerState::default()
        },
        runtime::ContainerState::Exited(exit) => terminated(view, exit),
    }
}

fn terminated(view: &ContainerView, exit: &runtime::Exit) -> ContainerState {
    let reason = if !exit.message.is_empty() {
        "StartError"
    } else if exit.oom_killed {
        "OOMKilled"
    } else if exit.code == 0 {
        "Completed"
    } else {
        "Error"
    };
    let message = non_empty(&exit.message).or_else(|| view.message.as_deref().and_then(non_empty));
    ContainerState {
        terminated: Some(ContainerStateTerminated {
            exit_code: exit.code,
            reason: Some(reason.to_owned()),
            message,
            started_at: Some(clock::seconds(clock::from_ns(exit.started_at_ns))),
            finished_at: Some(clock::seconds(clock::from_ns(exit.finished_at_ns))),
            container_id: Some(format!("{ID_SCHEME}{}", view.id)),
            signal: None,
        }),
        ..ContainerState::default()
    }
}

/// What upstream's `getPhase` counts.
#[derive(Default)]
struct Counts {
    pending_init: usize,
    failed_init: usize,
    unknown: usize,
    running: usize,
    waiting: usize,
    stopped: usize,
    succeeded: usize,
}

fn exit_code(state: Option<&ContainerState>) -> Option<i32> {
    Some(state?.terminated.as_ref()?.exit_code)
}

fn count(pod: &Pod, observed: &Observed, init: &[ContainerStatus], main: &[ContainerStatus]) -> Counts {
    let mut n = Counts::default();
    let past_init = plan::initialized(pod, observed);
    for (container, status) in pod::init_containers(pod).iter().zip(init) {
        let code = exit_code(status.state.as_ref()).or_else(|| exit_code(status.last_state.as_ref()));
        if pod::is_sidecar(container) {
            n.pending_init += usize::from(!past_init && status.started != Some(true));
        } else {
            match code {
                Some(0) => {}
                Some(_) => n.failed_init += 1,
                None => n.pending_init += usize::from(!past_init),
            }
        }
    }
    for status in main {
        let state = status.state.as_ref();
        if state.is_some_and(|s| s.running.is_some()) {
            n.running += 1;
        } else if let Some(code) = exit_code(state) {
            n.stopped += 1;
            n.succeeded += usize::from(code == 0);
        } else if state.is_some_and(|s| s.waiting.is_some()) {
            if exit_code(status.last_state.as_ref()).is_some() { n.stopped += 1 } else { n.waiting += 1 }
        } else {
            n.unknown += 1;
        }
    }
    n
}

fn phase(
    pod: &Pod,
    observed: &Observed,
    init: &[ContainerStatus],
    main: &[ContainerStatus],
    terminal: bool,
) -> &'static str {
    let n = count(pod, observed, init, main);
    let policy = pod::restart_policy(pod);
    let ending = terminal || observed.ending.is_some();
    if n.failed_init > 0 && (policy == RestartPolicy::Never || ending) {
        return "Failed";
    }
    if n.pending_init > 0 || n.failed_init > 0 && n.running == 0 && n.stopped == 0 || n.waiting > 0 {
        return "Pending";
    }
    if n.unknown > 0 {
        return "Pending";
    }
    if n.running > 0 {
        return "Running";
    }
    if n.stopped == 0 {
        return "Pending";
    }
    let all_well = n.stopped == n.succeeded;
    if ending {
        return if all_well { "Succeeded" } else { "Failed" };
    }
    match policy {
        RestartPolicy::Always => "Running",
        RestartPolicy::OnFailure | RestartPolicy::Never if all_well => "Succeeded",
        RestartPolicy::Never => "Failed",
        RestartPolicy::OnFailure => "Running",
    }
}

#[cfg(test)]
mod tests;
