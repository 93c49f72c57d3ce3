//! The Node object: registered at once, its status written on change and every five minutes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{
    ContainerImage, DaemonEndpoint, Node, NodeAddress, NodeCondition, NodeDaemonEndpoints, NodeStatus,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Api;
use kube::api::{Patch, PatchParams, PostParams};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::clock;
use crate::config::PORT;
use crate::events::Kind;
use crate::shared::Shared;
use weft_agent_runtime::chain;

use crate::start::api_error;

pub(crate) mod lease;
mod machine;

pub(crate) use machine::Machine;

/// The status is written at least so often (upstream's report frequency).
const REPORT: Duration = Duration::from_secs(300);
/// First delay after a failed write; doubles up to the bound.
const RETRY_FIRST: Duration = Duration::from_millis(50);
const RETRY_MAX: Duration = Duration::from_secs(7);
/// So long after a restart a node that was Ready stays so while its network is taken over.
const TAKE_OVER: Duration = Duration::from_secs(10);
/// Images are listed anew this often; nobody waits for them.
const IMAGES_LISTED: usize = 50;

/// Registers the node and keeps its status until shutdown.
pub(crate) async fn run(shared: Arc<Shared>, stop: CancellationToken) {
    let mut ready = shared.config.network_ready.clone();
    let mut network = *ready.borrow_and_update();
    let mut known = Known { registered: false, conditions: Vec::new(), patience: Instant::now() + TAKE_OVER };
    let mut retry = RETRY_FIRST;
    shared.events.node(Kind::Normal, "Starting", "Starting kubelet.".to_owned());
    loop {
        let written = tokio::select! {
            () = stop.cancelled() => return,
            written = report(&shared, network, &mut known) => written,
        };
        let delay = match written {
            Ok(next) => {
                retry = RETRY_FIRST;
                next
            }
            Err(error) => {
                tracing::warn!(
                    node = shared.config.node_name,
                    error = api_error(&error),
                    "cannot write the node's status"
                );
                let delay = retry;
                retry = (retry * 2).min(RETRY_MAX);
                delay
            }
        };
        tokio::select! {
            () = stop.cancelled() => return,
            Ok(()) = ready.changed() => network = *ready.borrow_and_update(),
            () = tokio::time::sleep(delay) => {}
        }
    }
}

/// What this kubelet knows of its Node object.
struct Known {
    /// The object is there and has this machine's labels.
    registered: bool,
    /// Its conditions.
    conditions: Vec<NodeCondition>,
    /// Until then a network that is not there yet is one that is being taken over.
    patience: Instant,
}

impl Known {
    /// How much longer the Node stays as it is. The pods' network outlives the agent: not Ready for a moment would take
    /// every pod from its Services.
    fn takes_over(&self, network: bool, now: Instant) -> Option<Duration> {
        let was_ready = self.conditions.iter().any(|c| c.type_ == "Ready" && c.status == "True");
        let left = self.patience.saturating_duration_since(now);
        (!network && was_ready && !left.is_zero()).then_some(left)
    }
}

/// Writes the status; makes the object if it is not there. Answers when the next report is due.
async fn report(shared: &Shared, network: bool, known: &mut Known) -> Result<Duration, kube::Error> {
    let api: Api<Node> = Api::all(shared.client.clone());
    let name = &shared.config.node_name;
    let now = clock::now();
    if !known.registered {
        let status = status(shared, (network, &[], now)).await;
        let wanted = node(shared, status.clone());
        match api.create(&PostParams::default(), &wanted).await {
            Ok(_) => {
                announce(shared, &[], status.conditions.iter().flatten());
                *known = Known {
                    registered: true,
                    conditions: status.conditions.unwrap_or_default(),
                    patience: Instant::now(),
                };
                return Ok(REPORT);
            }
            Err(kube::Error::Api(answer)) if answer.code == 409 => {
                let existing = api.get(name).await?;
                known.conditions = existing.status.and_then(|s| s.conditions).unwrap_or_default();
                let (labels, annotations) =
                    (shared.machine.labels(&shared.config), &shared.config.annotations);
                let patch = json!({"metadata": {"labels": labels, "annotations": annotations}});
                api.patch(name, &PatchParams::default(), &Patch::Strategic(patch)).await?;
                known.registered = true;
            }
            Err(error) => return Err(error),
        }
    }
    if let Some(left) = known.takes_over(network, Instant::now()) {
        return Ok(left);
    }
    let before = &known.conditions;
    let status = status(shared, (network, before, now)).await;
    let mut body = json!({"status": serde_json::to_value(&status).unwrap_or(Value::Null)});
    // The schema merges addresses by type, and a node of two families has two of one type: the list goes as a whole.
    if let Some(addresses) = body.pointer_mut("/status/addresses").and_then(Value::as_array_mut) {
        addresses.push(json!({"$patch": "replace"}));
    }
    match api.patch_status(name, &PatchParams::default(), &Patch::Strategic(body)).await {
        Ok(_) => {
            announce(shared, before, status.conditions.iter().flatten());
            known.conditions = status.conditions.unwrap_or_default();
            Ok(REPORT)
        }
        Err(error) => {
            if matches!(&error, kube::Error::Api(answer) if answer.code == 404) {
                // Somebody deleted the node: the next round registers it again.
                known.registered = false;
            }
            Err(error)
        }
    }
}

/// An Event for every condition that changed.
fn announce<'a>(shared: &Shared, before: &[NodeCondition], after: impl Iterator<Item = &'a NodeCondition>) {
    for condition in after {
        if before.iter().any(|b| b.type_ == condition.type_ && b.status == condition.status) {
            continue;
        }
        let reason = match (condition.type_.as_str(), condition.status == "True") {
            ("Ready", true) => "NodeReady",
            ("Ready", false) => "NodeNotReady",
            ("MemoryPressure", false) => "NodeHasSufficientMemory",
            ("DiskPressure", false) => "NodeHasNoDiskPressure",
            ("PIDPressure", false) => "NodeHasSufficientPID",
            _ => continue,
        };
        let message = format!("Node {} status is now: {reason}", shared.config.node_name);
        shared.events.node(Kind::Normal, reason, message);
    }
}

fn node(shared: &Shared, status: NodeStatus) -> Node {
    Node {
        metadata: ObjectMeta {
            name: Some(shared.config.node_name.clone()),
            labels: Some(shared.machine.labels(&shared.config)),
            annotations: Some(annotations(&shared.config.annotations)),
            ..ObjectMeta::default()
        },
        spec: None,
        status: Some(status),
    }
}

fn annotations(own: &BTreeMap<String, Option<String>>) -> BTreeMap<String, String> {
    let own = own.iter().filter_map(|(name, value)| Some((name.clone(), value.clone()?)));
    let attach = ("volumes.kubernetes.io/controller-managed-attach-detach".to_owned(), "true".to_owned());
    own.chain([attach]).collect()
}

async fn status(shared: &Shared, (network, before, now): (bool, &[NodeCondition], Timestamp)) -> NodeStatus {
    let address = |type_: &str, address: String| NodeAddress { type_: type_.to_owned(), address };
    let ips = shared.config.node_ips();
    let mut addresses: Vec<_> = ips.iter().map(|ip| address("InternalIP", ip.to_string())).collect();
    addresses.push(address("Hostname", shared.config.node_name.clone()));
    let capacity = shared.machine.capacity();
    let runtime_error = shared.runtime.list_images().await;
    let images = runtime_error.as_ref().map(|list| {
        list.iter().take(IMAGES_LISTED).map(|image| ContainerImage {
            names: Some(image.tags.clone()),
            size_bytes: i64::try_from(image.size_bytes).ok(),
        })
    });
    NodeStatus {
        addresses: Some(addresses),
        allocatable: Some(capacity.clone()),
        capacity: Some(capacity),
        conditions: Some(conditions(
            network,
            runtime_error.as_ref().err().map(|e| chain(e)).as_deref(),
            before,
            now,
        )),
        daemon_endpoints: Some(NodeDaemonEndpoints {
            kubelet_endpoint: Some(DaemonEndpoint { port: i32::from(PORT) }),
        }),
        node_info: Some(shared.machine.info.clone()),
        images: images.ok().map(Iterator::collect),
        ..NodeStatus::default()
    }
}

/// The node's conditions, with upstream's reasons and messages.
fn conditions(
    network: bool,
    runtime_error: Option<&str>,
    before: &[NodeCondition],
    now: Timestamp,
) -> Vec<NodeCondition> {
    let problem = match (runtime_error, network) {
        (Some(error), _) => Some(format!("container runtime is down: {error}")),
        (None, false) => Some(
            "container runtime network not ready: NetworkReady=false reason:NetworkPluginNotReady \
             message:Network plugin returns error: cni plugin not initialized"
                .to_owned(),
        ),
        (None, true) => None,
    };
    let ready = match problem {
        None => ("Ready", true, "KubeletReady", "kubelet is posting ready status".to_owned()),
        Some(problem) => ("Ready", false, "KubeletNotReady", problem),
    };
    let list = [
        (
            "MemoryPressure",
            false,
            "KubeletHasSufficientMemory",
            "kubelet has sufficient memory available".to_owned(),
        ),
        ("DiskPressure", false, "KubeletHasNoDiskPressure", "kubelet has no disk pressure".to_owned()),
        ("PIDPressure", false, "KubeletHasSufficientPID", "kubelet has sufficient PID available".to_owned()),
        ready,
    ];
    let made = |(type_, status, reason, message): (&str, bool, &str, String)| {
        let status = if status { "True" } else { "False" };
        let same = before.iter().find(|b| b.type_ == type_ && b.status == status);
        NodeCondition {
            type_: type_.to_owned(),
            status: status.to_owned(),
            reason: Some(reason.to_owned()),
            message: Some(message),
            last_heartbeat_time: Some(clock::seconds(now)),
            last_transition_time: same
                .and_then(|b| b.last_transition_time.clone())
                .or_else(|| Some(clock::seconds(now))),
        }
    };
    list.into_iter().map(made).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_annotations_with_a_value_are_made() {
        let own = [("a".to_owned(), Some("1".to_owned())), ("b".to_owned(), None)].into();
        let made: Vec<_> = annotations(&own).into_keys().collect();
        assert_eq!(made, ["a", "volumes.kubernetes.io/controller-managed-attach-detach"]);
    }

    #[test]
    fn a_ready_node_stays_so_while_its_network_is_taken_over_however_often_a_write_fails() {
        let start = Instant::now();
        let ready = |network| conditions(network, None, &[], Timestamp::UNIX_EPOCH);
        let mut known = Known { registered: false, conditions: ready(true), patience: start + TAKE_OVER };
        assert_eq!(known.takes_over(false, start), Some(TAKE_OVER));
        known.registered = true;
        assert!(known.takes_over(false, start + TAKE_OVER / 2).is_some(), "a second round waits on");
        assert_eq!(known.takes_over(true, start), None, "the network is there");
        assert_eq!(known.takes_over(false, start + TAKE_OVER), None, "patience ends");
        known.conditions = ready(false);
        assert_eq!(known.takes_over(false, start), None, "it was not Ready");
    }

    #[test]
    fn ready_needs_runtime_and_network_and_keeps_its_time() {
        let at = |s| Timestamp::from_second(s).unwrap();
        let ready = |list: &[NodeCondition]| list.iter().find(|c| c.type_ == "Ready").cloned().unwrap();
        let first = conditions(false, None, &[], at(1));
        assert_eq!((ready(&first).status.as_str(), first.len()), ("False", 4));
        assert!(ready(&first).message.unwrap().contains("NetworkReady=false"));
        let second = conditions(true, None, &first, at(2));
        assert_eq!(ready(&second).reason.as_deref(), Some("KubeletReady"));
        assert_eq!(ready(&second).last_transition_time, Some(clock::seconds(at(2))));
        let third = conditions(true, None, &second, at(3));
        assert_eq!(ready(&third).last_transition_time, Some(clock::seconds(at(2))));
        assert_eq!(ready(&third).last_heartbeat_time, Some(clock::seconds(at(3))));
        assert_eq!(ready(&conditions(true, Some("gone"), &third, at(4))).status, "False");
    }
}
