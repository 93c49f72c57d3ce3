//! The pod conditions that belong to the kubelet; all others are kept as they are.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ContainerStatus, Pod, PodCondition, PodStatus};

use crate::clock;
use crate::observed::Observed;
use crate::plan;
use crate::pod;

/// What the conditions are made from.
pub(super) struct Inputs<'a> {
    pub(super) phase: &'a str,
    pub(super) init: &'a [ContainerStatus],
    pub(super) main: &'a [ContainerStatus],
    pub(super) old: &'a PodStatus,
    pub(super) now: Timestamp,
}

struct Verdict {
    status: bool,
    reason: &'static str,
    message: String,
}

impl Verdict {
    fn yes() -> Self {
        Self { status: true, reason: "", message: String::new() }
    }

    fn no(reason: &'static str, message: String) -> Self {
        Self { status: false, reason, message }
    }
}

/// All conditions, upstream's order: the kubelet's own first, then the others.
pub(super) fn generate(pod: &Pod, observed: &Observed, inputs: &Inputs<'_>) -> Vec<PodCondition> {
    let containers = containers_ready(pod, inputs);
    let own = [
        ("PodReadyToStartContainers", sandbox_ready(pod, observed)),
        ("Initialized", initialized(pod, observed, inputs)),
        ("Ready", ready(pod, &containers, inputs)),
        ("ContainersReady", containers),
    ];
    let mut all: Vec<PodCondition> =
        own.iter().map(|(type_, verdict)| condition(pod, type_, verdict, inputs)).collect();
    let foreign =
        inputs.old.conditions.iter().flatten().filter(|c| !own.iter().any(|(type_, _)| *type_ == c.type_));
    all.extend(foreign.cloned());
    if !all.iter().any(|c| c.type_ == "PodScheduled") {
        all.push(condition(pod, "PodScheduled", &Verdict::yes(), inputs));
    }
    all
}

fn condition(pod: &Pod, type_: &str, verdict: &Verdict, inputs: &Inputs<'_>) -> PodCondition {
    let status = if verdict.status { "True" } else { "False" };
    let before = inputs.old.conditions.iter().flatten().find(|c| c.type_ == type_ && c.status == status);
    PodCondition {
        type_: type_.to_owned(),
        status: status.to_owned(),
        reason: (!verdict.reason.is_empty()).then(|| verdict.reason.to_owned()),
        message: (!verdict.message.is_empty()).then(|| verdict.message.clone()),
        last_transition_time: before
            .and_then(|c| c.last_transition_time.clone())
            .or_else(|| Some(clock::seconds(inputs.now))),
        last_probe_time: None,
        observed_generation: pod.metadata.generation,
    }
}

fn sandbox_ready(pod: &Pod, observed: &Observed) -> Verdict {
    let up = observed.sandbox.as_ref().is_some_and(|s| {
        s.ready && !observed.sandbox_stopped && (pod::host_network(pod) || !s.ips.is_empty())
    });
    Verdict { status: up, ..Verdict::yes() }
}

fn initialized(pod: &Pod, observed: &Observed, inputs: &Inputs<'_>) -> Verdict {
    match inputs.phase {
        "Succeeded" => return Verdict { reason: "PodCompleted", ..Verdict::yes() },
        _ if pod::init_containers(pod).is_empty() || plan::initialized(pod, observed) => {
            return Verdict::yes();
        }
        _ => {}
    }
    let incomplete: Vec<&str> = pod::init_containers(pod)
        .iter()
        .zip(inputs.init)
        .filter(|(c, s)| if pod::is_sidecar(c) { s.started != Some(true) } else { !s.ready })
        .map(|(c, _)| c.name.as_str())
        .collect();
    if incomplete.is_empty() {
        return Verdict::yes();
    }
    Verdict::no(
        "ContainersNotInitialized",
        format!("containers with incomplete status: [{}]", incomplete.join(" ")),
    )
}

fn containers_ready(pod: &Pod, inputs: &Inputs<'_>) -> Verdict {
    match inputs.phase {
        "Succeeded" => return Verdict::no("PodCompleted", String::new()),
        "Failed" => return Verdict::no("PodFailed", String::new()),
        _ => {}
    }
    let sidecars =
        pod::init_containers(pod).iter().zip(inputs.init).filter(|(c, _)| pod::is_sidecar(c)).map(|(_, s)| s);
    let unready: Vec<&str> =
        sidecars.chain(inputs.main).filter(|s| !s.ready).map(|s| s.name.as_str()).collect();
    if unready.is_empty() {
        return Verdict::yes();
    }
    Verdict::no("ContainersNotReady", format!("containers with unready status: [{}]", unready.join(" ")))
}

fn ready(pod: &Pod, containers: &Verdict, inputs: &Inputs<'_>) -> Verdict {
    if !containers.status {
        return Verdict::no(containers.reason, containers.message.clone());
    }
    let mut failing = Vec::new();
    for gate in pod::spec(pod).readiness_gates.iter().flatten() {
        let type_ = &gate.condition_type;
        match inputs.old.conditions.iter().flatten().find(|c| c.type_ == *type_) {
            None => failing
                .push(format!("corresponding condition of pod readiness gate \"{type_}\" does not exist.")),
            Some(c) if c.status != "True" => failing.push(format!(
                "the status of pod readiness gate \"{type_}\" is not \"True\", but {}",
                c.status
            )),
            Some(_) => {}
        }
    }
    if failing.is_empty() {
        Verdict::yes()
    } else {
        Verdict::no("ReadinessGatesNotReady", failing.join(", "))
    }
}
