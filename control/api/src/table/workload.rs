//! Rows of the kinds that own pods.

use jiff::{SignedDuration, Timestamp};
use serde_json::Value;

use super::duration::{age, human_duration, instant, since};
use super::format::{
    NONE, UNKNOWN, UNSET, containers, count, is_true, items, labels, name, number, scalar, selector, text,
    text_or,
};

pub(super) fn row(group: &str, kind: &str, object: &Value, now: Timestamp) -> Option<Vec<Value>> {
    Some(match (group, kind) {
        ("", "PodTemplate") => pod_template(object),
        ("", "ReplicationController") => replicas(object, labels(&object["spec"]["selector"]), now),
        ("apps", "ReplicaSet") => replicas(object, selector(&object["spec"]["selector"]), now),
        ("apps", "Deployment") => deployment(object, now),
        ("apps", "StatefulSet") => stateful_set(object, now),
        ("apps", "DaemonSet") => daemon_set(object, now),
        ("apps", "ControllerRevision") => controller_revision(object, now),
        ("batch", "Job") => job(object, now),
        ("batch", "CronJob") => cron_job(object, now),
        ("autoscaling", "HorizontalPodAutoscaler") => autoscaler(object, now),
        ("autoscaling", "Scale") => vec![
            name(object),
            number(&object["spec"]["replicas"]).into(),
            number(&object["status"]["replicas"]).into(),
            age(object, now),
        ],
        ("policy", "PodDisruptionBudget") => disruption_budget(object, now),
        _ => return None,
    })
}

fn pod_template(object: &Value) -> Vec<Value> {
    let [names, images] = containers(&object["template"]);
    vec![name(object), names, images, labels(&object["template"]["metadata"]["labels"]).into()]
}

fn replicas(object: &Value, selector: String, now: Timestamp) -> Vec<Value> {
    let [names, images] = containers(&object["spec"]["template"]);
    let status = &object["status"];
    vec![
        name(object),
        number(&object["spec"]["replicas"]).into(),
        number(&status["replicas"]).into(),
        number(&status["readyReplicas"]).into(),
        age(object, now),
        names,
        images,
        selector.into(),
    ]
}

fn deployment(object: &Value, now: Timestamp) -> Vec<Value> {
    let [names, images] = containers(&object["spec"]["template"]);
    let status = &object["status"];
    vec![
        name(object),
        ready_of_desired(object).into(),
        number(&status["updatedReplicas"]).into(),
        number(&status["availableReplicas"]).into(),
        age(object, now),
        names,
        images,
        selector(&object["spec"]["selector"]).into(),
    ]
}

fn ready_of_desired(object: &Value) -> String {
    format!("{}/{}", number(&object["status"]["readyReplicas"]), number(&object["spec"]["replicas"]))
}

fn stateful_set(object: &Value, now: Timestamp) -> Vec<Value> {
    let [names, images] = containers(&object["spec"]["template"]);
    vec![name(object), ready_of_desired(object).into(), age(object, now), names, images]
}

fn daemon_set(object: &Value, now: Timestamp) -> Vec<Value> {
    let [names, images] = containers(&object["spec"]["template"]);
    let status = |field: &str| number(&object["status"][field]).into();
    vec![
        name(object),
        status("desiredNumberScheduled"),
        status("currentNumberScheduled"),
        status("numberReady"),
        status("updatedNumberScheduled"),
        status("numberAvailable"),
        labels(&object["spec"]["template"]["spec"]["nodeSelector"]).into(),
        age(object, now),
        names,
        images,
        selector(&object["spec"]["selector"]).into(),
    ]
}

fn controller_revision(object: &Value, now: Timestamp) -> Vec<Value> {
    let owners = items(&object["metadata"]["ownerReferences"]);
    let controller = owners.iter().find(|owner| owner["controller"] == true).map_or_else(
        || NONE.to_owned(),
        |owner| {
            let kind = text(&owner["kind"]).to_lowercase();
            let target = text(&owner["name"]);
            match text(&owner["apiVersion"]).split_once('/') {
                Some((group, _)) => format!("{kind}.{group}/{target}"),
                None => format!("{kind}/{target}"),
            }
        },
    );
    vec![name(object), controller.into(), number(&object["revision"]).into(), age(object, now)]
}

fn job(object: &Value, now: Timestamp) -> Vec<Value> {
    let (spec, status) = (&object["spec"], &object["status"]);
    let succeeded = number(&status["succeeded"]);
    let completions = match (spec["completions"].as_i64(), spec["parallelism"].as_i64()) {
        (Some(completions), _) => format!("{succeeded}/{completions}"),
        (None, Some(parallelism)) if parallelism > 1 => format!("{succeeded}/1 of {parallelism}"),
        (None, _) => format!("{succeeded}/1"),
    };
    let duration = instant(&status["startTime"]).map_or_else(String::new, |start| {
        human_duration(instant(&status["completionTime"]).unwrap_or(now).duration_since(start))
    });
    let [names, images] = containers(&spec["template"]);
    vec![
        name(object),
        job_status(object).into(),
        completions.into(),
        duration.into(),
        age(object, now),
        names,
        images,
        selector(&spec["selector"]).into(),
    ]
}

fn job_status(job: &Value) -> &'static str {
    let ended = ["Complete", "Failed"].into_iter().find(|condition| is_true(job, condition));
    if let Some(ended) = ended {
        return ended;
    }
    if job["metadata"]["deletionTimestamp"].is_string() {
        return "Terminating";
    }
    ["Suspended", "FailureTarget", "SuccessCriteriaMet"]
        .into_iter()
        .find(|condition| is_true(job, condition))
        .unwrap_or("Running")
}

fn cron_job(object: &Value, now: Timestamp) -> Vec<Value> {
    let (spec, status) = (&object["spec"], &object["status"]);
    let suspend = match spec["suspend"].as_bool() {
        Some(true) => "True",
        Some(false) => "False",
        None => UNSET,
    };
    let last = &status["lastScheduleTime"];
    let last = if last.is_string() { since(last, now) } else { NONE.to_owned() };
    let [names, images] = containers(&spec["jobTemplate"]["spec"]["template"]);
    vec![
        name(object),
        text(&spec["schedule"]).into(),
        text_or(&spec["timeZone"], NONE).into(),
        suspend.into(),
        count(&status["active"]).into(),
        last.into(),
        age(object, now),
        names,
        images,
        selector(&spec["jobTemplate"]["spec"]["selector"]).into(),
    ]
}

fn disruption_budget(object: &Value, now: Timestamp) -> Vec<Value> {
    let limit = |field: &str| -> Value {
        let value = &object["spec"][field];
        if value.is_null() { "N/A".into() } else { scalar(value).into() }
    };
    vec![
        name(object),
        limit("minAvailable"),
        limit("maxUnavailable"),
        number(&object["status"]["disruptionsAllowed"]).into(),
        age(object, now),
    ]
}

fn autoscaler(object: &Value, now: Timestamp) -> Vec<Value> {
    let spec = &object["spec"];
    let target = &spec["scaleTargetRef"];
    let minimum =
        spec["minReplicas"].as_i64().map_or_else(|| UNSET.to_owned(), |minimum| minimum.to_string());
    vec![
        name(object),
        format!("{}/{}", text(&target["kind"]), text(&target["name"])).into(),
        metrics(object).into(),
        minimum.into(),
        number(&spec["maxReplicas"]).into(),
        number(&object["status"]["currentReplicas"]).into(),
        age(object, now),
    ]
}

/// At most two metrics are shown.
const METRICS_SHOWN: usize = 2;

fn metrics(object: &Value) -> String {
    let specs = items(&object["spec"]["metrics"]);
    if specs.is_empty() {
        return cpu_of_v1(object);
    }
    let all: Vec<String> = specs
        .iter()
        .enumerate()
        .map(|(index, spec)| metric(spec, &object["status"]["currentMetrics"][index]))
        .collect();
    let shown = all.len().min(METRICS_SHOWN);
    let text = all[..shown].join(", ");
    if all.len() > shown { format!("{text} + {} more...", all.len() - shown) } else { text }
}

/// An object of autoscaling/v1 has one target: the use of CPU.
fn cpu_of_v1(object: &Value) -> String {
    let Some(target) = object["spec"]["targetCPUUtilizationPercentage"].as_i64() else {
        return NONE.to_owned();
    };
    match object["status"]["currentCPUUtilizationPercentage"].as_i64() {
        Some(current) => format!("cpu: {current}%/{target}%"),
        None => format!("cpu: {UNKNOWN}/{target}%"),
    }
}

fn metric(spec: &Value, status: &Value) -> String {
    let source = match text(&spec["type"]) {
        "External" => "external",
        "Pods" => "pods",
        "Object" => "object",
        "Resource" => "resource",
        "ContainerResource" => "containerResource",
        _ => return "<unknown type>".to_owned(),
    };
    let (spec, current) = (&spec[source], &status[source]["current"]);
    let target = &spec["target"];
    let quantity = |field: &str| {
        let current = text_or(&current[field], UNKNOWN);
        format!("{current}/{}", scalar(&target[field]))
    };
    match source {
        "pods" => quantity("averageValue"),
        "external" | "object" if target["averageValue"].is_null() => quantity("value"),
        "external" | "object" => format!("{} (avg)", quantity("averageValue")),
        _ if !target["averageValue"].is_null() => {
            format!("{}: {}", text(&spec["name"]), quantity("averageValue"))
        }
        _ => {
            let percent = |value: &Value, otherwise: &str| {
                value.as_i64().map_or_else(|| otherwise.to_owned(), |value| format!("{value}%"))
            };
            let now = percent(&current["averageUtilization"], UNKNOWN);
            format!("{}: {now}/{}", text(&spec["name"]), percent(&target["averageUtilization"], "<auto>"))
        }
    }
}

/// A number of seconds as a human duration.
pub(super) fn seconds(value: i64) -> String {
    human_duration(SignedDuration::from_secs(value))
}
