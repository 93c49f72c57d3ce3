//! The row of a pod: readiness, the one word that sums up its state, restarts.

use jiff::Timestamp;
use serde_json::Value;

use super::duration::{age, human_duration, instant};
use super::format::{NONE, is_true, items, name, number, text, text_or};

/// Restarts and the last time that a container ended.
#[derive(Clone, Copy, Default)]
struct Restarts {
    count: i64,
    last: Option<Timestamp>,
}

impl Restarts {
    fn add(&mut self, container: &Value) {
        self.count += number(&container["restartCount"]);
        self.last = self.last.max(instant(&container["lastState"]["terminated"]["finishedAt"]));
    }

    fn text(self, now: Timestamp) -> String {
        match self.last {
            Some(last) if self.count != 0 => {
                format!("{} ({} ago)", self.count, human_duration(now.duration_since(last)))
            }
            Some(_) | None => self.count.to_string(),
        }
    }
}

/// What the container statuses say, gathered in upstream's order.
struct Summary {
    reason: String,
    ready: usize,
    restarts: Restarts,
}

pub(super) fn row(pod: &Value, now: Timestamp) -> Vec<Value> {
    let summary = summarise(pod);
    let total = items(&pod["spec"]["containers"]).len()
        + items(&pod["spec"]["initContainers"]).iter().filter(|c| is_sidecar(c)).count();
    vec![
        name(pod),
        format!("{}/{total}", summary.ready).into(),
        final_reason(pod, summary.reason).into(),
        summary.restarts.text(now).into(),
        age(pod, now),
        text_or(&pod["status"]["podIPs"][0]["ip"], NONE).into(),
        text_or(&pod["spec"]["nodeName"], NONE).into(),
        text_or(&pod["status"]["nominatedNodeName"], NONE).into(),
        readiness_gates(pod).into(),
    ]
}

fn is_sidecar(container: &Value) -> bool {
    container["restartPolicy"] == "Always"
}

fn summarise(pod: &Value) -> Summary {
    let status = &pod["status"];
    let mut summary = Summary {
        reason: text_or(&status["reason"], text(&status["phase"])).to_owned(),
        ready: 0,
        restarts: Restarts::default(),
    };
    let gated = |one: &Value| one["type"] == "PodScheduled" && one["reason"] == "SchedulingGated";
    if items(&status["conditions"]).iter().any(gated) {
        "SchedulingGated".clone_into(&mut summary.reason);
    }
    let (initializing, sidecar_restarts) = init_containers(pod, &mut summary);
    if !initializing || is_true(pod, "Initialized") {
        summary.restarts = sidecar_restarts;
        app_containers(pod, &mut summary);
    }
    summary
}

/// Looks at init containers up to the first that is not done; says whether there is one, and how often the sidecars restarted.
fn init_containers(pod: &Value, summary: &mut Summary) -> (bool, Restarts) {
    let specs = items(&pod["spec"]["initContainers"]);
    let mut sidecar_restarts = Restarts::default();
    for (index, container) in items(&pod["status"]["initContainerStatuses"]).iter().enumerate() {
        summary.restarts.add(container);
        let sidecar = specs.iter().any(|spec| spec["name"] == container["name"] && is_sidecar(spec));
        if sidecar {
            sidecar_restarts.add(container);
        }
        let terminated = &container["state"]["terminated"];
        if terminated.is_object() && number(&terminated["exitCode"]) == 0 {
            continue;
        }
        if sidecar && container["started"] == true {
            summary.ready += usize::from(container["ready"] == true);
            continue;
        }
        let waiting = text(&container["state"]["waiting"]["reason"]);
        summary.reason = if terminated.is_object() {
            format!("Init:{}", ending(terminated))
        } else if !waiting.is_empty() && waiting != "PodInitializing" {
            format!("Init:{waiting}")
        } else {
            format!("Init:{index}/{}", specs.len())
        };
        return (true, sidecar_restarts);
    }
    (false, sidecar_restarts)
}

/// The last container looked at is the first of the list: its state wins.
fn app_containers(pod: &Value, summary: &mut Summary) {
    let mut running = false;
    for container in items(&pod["status"]["containerStatuses"]).iter().rev() {
        summary.restarts.add(container);
        let state = &container["state"];
        let waiting = text(&state["waiting"]["reason"]);
        if !waiting.is_empty() {
            waiting.clone_into(&mut summary.reason);
        } else if state["terminated"].is_object() {
            summary.reason = ending(&state["terminated"]);
        } else if container["ready"] == true && state["running"].is_object() {
            running = true;
            summary.ready += 1;
        }
    }
    if summary.reason == "Completed" && running {
        let reason = if is_true(pod, "Ready") { "Running" } else { "NotReady" };
        reason.clone_into(&mut summary.reason);
    }
}

/// How a container ended: its reason, else its signal, else its exit code.
fn ending(terminated: &Value) -> String {
    match (text(&terminated["reason"]), number(&terminated["signal"])) {
        ("", 0) => format!("ExitCode:{}", number(&terminated["exitCode"])),
        ("", signal) => format!("Signal:{signal}"),
        (reason, _) => reason.to_owned(),
    }
}

fn final_reason(pod: &Value, reason: String) -> String {
    let deleted = pod["metadata"]["deletionTimestamp"].is_string();
    let ended = matches!(text(&pod["status"]["phase"]), "Succeeded" | "Failed");
    if deleted && pod["status"]["reason"] == "NodeLost" {
        "Unknown".to_owned()
    } else if deleted && !ended {
        "Terminating".to_owned()
    } else {
        reason
    }
}

fn readiness_gates(pod: &Value) -> String {
    let gates = items(&pod["spec"]["readinessGates"]);
    if gates.is_empty() {
        return NONE.to_owned();
    }
    let passed = gates.iter().filter(|gate| is_true(pod, text(&gate["conditionType"]))).count();
    format!("{passed}/{}", gates.len())
}
