//! Why a Service has no endpoint that takes connections: what its selector finds, and what is wrong with that. Pure.

use k8s_openapi::api::core::v1::{Pod, Service, ServicePort};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::ResourceExt as _;

use super::report::Step;

/// Pods that are named before the rest is only counted.
const MAX_NAMED: usize = 5;

/// The labels that a Service selects by, as a list request takes them; `None` for a Service without selector.
pub(crate) fn selector(service: &Service) -> Option<String> {
    let selector = service.spec.as_ref()?.selector.as_ref().filter(|selector| !selector.is_empty())?;
    Some(selector.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(","))
}

/// The failing step: why no endpoint of `port` is ready. `pods` are those that the selector finds.
pub(crate) fn no_endpoints(service: &Service, port: Option<&ServicePort>, pods: &[Pod]) -> Step {
    let name = format!("{}/{}", service.namespace().unwrap_or_default(), service.name_any());
    let step = |says: String| Step::fail("backend", says).by(format!("Service {name}"));
    let Some(selector) = selector(service) else {
        return step(
            "the Service has no selector, and no EndpointSlice names an endpoint that is ready".to_owned(),
        );
    };
    let live: Vec<&Pod> = pods.iter().filter(|pod| !is_finished(pod)).collect();
    if live.is_empty() {
        return step(format!("no pod matches the selector {selector}"));
    }
    let (ready, unready): (Vec<&Pod>, Vec<&Pod>) = live.into_iter().partition(|pod| is_ready(pod));
    if ready.is_empty() {
        let mut named: Vec<String> = unready.iter().take(MAX_NAMED).map(|pod| unready_text(pod)).collect();
        if unready.len() > MAX_NAMED {
            named.push(format!("and {} more", unready.len() - MAX_NAMED));
        }
        let object = format!("Pod {}/{}", unready[0].namespace().unwrap_or_default(), unready[0].name_any());
        let says = format!("no pod that matches {selector} is ready: {}", named.join("; "));
        return Step::fail("backend", says).by(object);
    }
    if let Some(ServicePort { target_port: Some(IntOrString::String(target)), .. }) = port
        && !ready.iter().any(|pod| has_port(pod, target))
    {
        let named = ready.iter().take(MAX_NAMED).map(|pod| pod.name_any()).collect::<Vec<_>>().join(", ");
        return step(format!(
            "targetPort is {target:?}, and no container of {named} has a port of that name"
        ));
    }
    step(format!(
        "{} pods match {selector} and are ready, but no EndpointSlice has them yet: is the controller running?",
        ready.len()
    ))
}

fn is_finished(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    matches!(phase, Some("Succeeded" | "Failed"))
}

/// Whether its Ready condition is true.
pub(crate) fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
    let mut ready = conditions.filter(|condition| condition.type_ == "Ready");
    pod.metadata.deletion_timestamp.is_none() && ready.any(|condition| condition.status == "True")
}

/// A pod with the nearest cause of its not being ready.
pub(crate) fn unready_text(pod: &Pod) -> String {
    format!("{} ({})", pod.name_any(), unready_cause(pod))
}

fn unready_cause(pod: &Pod) -> String {
    if pod.metadata.deletion_timestamp.is_some() {
        return "terminating".to_owned();
    }
    let Some(status) = &pod.status else { return "no status yet".to_owned() };
    let containers = || {
        let own = status.container_statuses.iter().flatten();
        status.init_container_statuses.iter().flatten().chain(own)
    };
    for container in containers() {
        let Some(waiting) = container.state.as_ref().and_then(|state| state.waiting.as_ref()) else {
            continue;
        };
        if let Some(reason) = waiting.reason.as_deref().filter(|reason| *reason != "ContainerCreating") {
            return format!("container {} waits: {reason}", container.name);
        }
    }
    let conditions = status.conditions.iter().flatten();
    let unscheduled = conditions.clone().find(|c| c.type_ == "PodScheduled" && c.status == "False");
    if let Some(condition) = unscheduled {
        return format!("not scheduled: {}", condition.message.as_deref().unwrap_or("no reason given"));
    }
    if let Some(container) =
        containers().find(|c| !c.ready && c.state.as_ref().is_some_and(|s| s.running.is_some()))
    {
        return format!("container {} runs, and its readiness probe does not succeed", container.name);
    }
    let ready = conditions.clone().find(|c| c.type_ == "Ready" && c.status != "True");
    let message = ready.and_then(|condition| condition.message.clone()).filter(|message| !message.is_empty());
    message.unwrap_or_else(|| status.phase.clone().unwrap_or_else(|| "no phase yet".to_owned()))
}

fn has_port(pod: &Pod, name: &str) -> bool {
    let containers =
        pod.spec.iter().flat_map(|spec| spec.containers.iter().chain(spec.init_containers.iter().flatten()));
    containers.flat_map(|container| container.ports.iter().flatten()).any(|p| p.name.as_deref() == Some(name))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn service(selector: serde_json::Value, target: serde_json::Value) -> Service {
        serde_json::from_value(json!({
            "metadata": {"namespace": "default", "name": "web"},
            "spec": {"selector": selector, "ports": [{"port": 80, "targetPort": target}]},
        }))
        .unwrap()
    }

    fn pod(status: serde_json::Value) -> Pod {
        serde_json::from_value(json!({
            "metadata": {"namespace": "default", "name": "web-1"},
            "spec": {"containers": [{"name": "main", "ports": [{"name": "http", "containerPort": 8080}]}]},
            "status": status,
        }))
        .unwrap()
    }

    fn cause(service: &Service, pods: &[Pod]) -> String {
        let port = service.spec.as_ref().unwrap().ports.as_ref().and_then(|ports| ports.first());
        no_endpoints(service, port, pods).says
    }

    #[test]
    fn the_nearest_cause_is_named() {
        let web = service(json!({"app": "web"}), json!("http"));
        assert_eq!(cause(&web, &[]), "no pod matches the selector app=web");
        let gone = pod(json!({"phase": "Succeeded"}));
        assert_eq!(
            cause(&web, &[gone]),
            "no pod matches the selector app=web",
            "a finished pod counts for nothing"
        );

        let waiting = pod(json!({"phase": "Pending", "containerStatuses": [{"name": "main", "ready": false,
            "image": "", "imageID": "", "restartCount": 0, "state": {"waiting": {"reason": "ImagePullBackOff"}}}]}));
        let says = cause(&web, &[waiting]);
        assert!(says.ends_with("is ready: web-1 (container main waits: ImagePullBackOff)"), "{says}");

        let failing = pod(json!({"phase": "Running", "containerStatuses": [{"name": "main", "ready": false,
            "image": "", "imageID": "", "restartCount": 0, "state": {"running": {}}}]}));
        assert!(cause(&web, &[failing]).contains("its readiness probe does not succeed"));

        let ready = || pod(json!({"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}));
        let misnamed = service(json!({"app": "web"}), json!("https"));
        let says = cause(&misnamed, &[ready()]);
        assert_eq!(says, "targetPort is \"https\", and no container of web-1 has a port of that name");
        assert!(cause(&web, &[ready()]).contains("no EndpointSlice has them yet"));
        assert!(cause(&service(json!({}), json!(80)), &[]).contains("has no selector"));
    }
}
