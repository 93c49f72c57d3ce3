//! Owns the pod ranges of nodes: each node gets a range of each of the cluster's, for as long as it lives.

use crate::error::{Doing, SyncError};
use crate::shared::Shared;
use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};
use k8s_openapi::api::core::v1::Node;
use kube::Client;
use kube::api::{Api, Patch, PatchParams};
use parking_lot::Mutex;
use serde_json::json;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use weft_control_client::informer::Change;
use weft_control_client::queue::{Outcome, Queue, work};
use weft_control_client::recorder::{Kind, Recorder, reference};
use weft_control_client::{ObjectKey, found};

/// Size of a node's IPv4 range.
pub const NODE_PREFIX_V4: u8 = 24;
/// Size of a node's IPv6 range.
pub const NODE_PREFIX_V6: u8 = 64;
/// When all ranges are taken, how long until the next look.
const FULL_RETRY: Duration = Duration::from_secs(30);

/// The controller.
pub(crate) struct Controller {
    client: Client,
    shared: Arc<Shared>,
    recorder: Recorder,
    queue: Queue<ObjectKey>,
    /// One for each family, the primary family's first.
    cluster: Vec<IpNetwork>,
    services: Vec<IpNetwork>,
    /// Given to a node, by its name, whether or not the cache shows it yet.
    given: Mutex<HashMap<ObjectKey, Vec<IpNetwork>>>,
}

impl Controller {
    /// Made before the caches are filled, so that it misses no change.
    pub(crate) fn new(
        client: Client,
        shared: Arc<Shared>,
        recorder: Recorder,
        (cluster, services): (Vec<IpNetwork>, Vec<IpNetwork>),
    ) -> Arc<Self> {
        let queue = Queue::default();
        let controller =
            Arc::new(Self { client, shared, recorder, queue, cluster, services, given: Mutex::default() });
        controller.shared.nodes.on_change_for(&controller, |controller, change| {
            let key = ObjectKey::of(&change.object().metadata);
            match change {
                Change::Applied { .. } => controller.queue.add(key),
                Change::Deleted(_) => {
                    controller.given.lock().remove(&key);
                }
            }
        });
        controller
    }

    /// One worker: ranges are given out one after the other.
    pub(crate) async fn run(&self, shutdown: &CancellationToken) {
        self.shared.nodes.synced().await;
        work(&self.queue, 1, shutdown, |key| self.sync(key)).await;
    }

    async fn sync(&self, key: ObjectKey) -> Result<Outcome, SyncError> {
        let Some(node) = self.shared.nodes.by_key(&key) else { return Ok(Outcome::Done) };
        let has = ranges(&node);
        if !has.is_empty() {
            self.given.lock().insert(key, has);
            return Ok(Outcome::Done);
        }
        let known = self.given.lock().get(&key).cloned();
        let free = known.or_else(|| {
            let nodes = self.shared.nodes.list();
            let given = self.given.lock();
            let taken: HashSet<_> =
                nodes.iter().flat_map(|n| ranges(n)).chain(given.values().flatten().copied()).collect();
            // All or nothing: a node's ranges can't be added to later.
            self.cluster.iter().map(|range| first_free(*range, &self.services, &taken)).collect()
        });
        let Some(free) = free else {
            let text = format!("Node {key} status is now: CIDRNotAvailable");
            self.recorder.event(reference(&*node), Kind::Normal, "CIDRNotAvailable", text);
            return Ok(Outcome::After(FULL_RETRY));
        };
        let api: Api<Node> = Api::all(self.client.clone());
        let written: Vec<String> = free.iter().map(ToString::to_string).collect();
        self.given.lock().insert(key.clone(), free);
        let body = json!({
            "metadata": {"uid": node.metadata.uid},
            "spec": {"podCIDR": written.first(), "podCIDRs": written},
        });
        let patched = api.patch(&key.name, &PatchParams::default(), &Patch::Merge(body)).await;
        found(patched).doing("give pod ranges to node", &key)?;
        tracing::info!(node = %key, ranges = written.join(","), "gave the node its pod ranges");
        Ok(Outcome::Done)
    }
}

fn ranges(node: &Node) -> Vec<IpNetwork> {
    let Some(spec) = &node.spec else { return Vec::new() };
    let listed = spec.pod_cidrs.as_deref().filter(|list| !list.is_empty());
    listed.unwrap_or(spec.pod_cidr.as_slice()).iter().filter_map(|text| text.parse().ok()).collect()
}

fn overlaps(a: IpNetwork, b: IpNetwork) -> bool {
    a.contains(b.network()) || b.contains(a.network())
}

/// The lowest range that is neither taken nor among the Services' addresses.
fn first_free(cluster: IpNetwork, services: &[IpNetwork], taken: &HashSet<IpNetwork>) -> Option<IpNetwork> {
    let free = |range: &IpNetwork| {
        !services.iter().any(|s| overlaps(*range, *s))
            && !taken.contains(range)
            && !taken.iter().any(|t| overlaps(*t, *range))
    };
    match cluster {
        IpNetwork::V4(net) => {
            let bits = NODE_PREFIX_V4.checked_sub(net.prefix())?;
            let base = u32::from(net.network());
            (0..1u64 << bits)
                .filter_map(|n| {
                    let step = u32::try_from(n << (32 - NODE_PREFIX_V4)).ok()?;
                    Some(IpNetwork::V4(Ipv4Network::new((base + step).into(), NODE_PREFIX_V4).ok()?))
                })
                .find(free)
        }
        IpNetwork::V6(net) => {
            let bits = u32::from(NODE_PREFIX_V6.checked_sub(net.prefix())?).min(16);
            let base = u128::from(net.network());
            (0..1u128 << bits)
                .filter_map(|n| {
                    let address = base + (n << (128 - u32::from(NODE_PREFIX_V6)));
                    Some(IpNetwork::V6(Ipv6Network::new(address.into(), NODE_PREFIX_V6).ok()?))
                })
                .find(free)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn free(cluster: &str, services: &str, taken: &[&str]) -> Option<String> {
        let taken = taken.iter().map(|t| t.parse().unwrap()).collect();
        first_free(cluster.parse().unwrap(), &[services.parse().unwrap()], &taken).map(|n| n.to_string())
    }

    #[test]
    fn the_lowest_free_range_is_given() {
        let rows = [
            ("10.42.0.0/16", "10.43.0.0/16", vec![], Some("10.42.0.0/24")),
            ("10.42.0.0/16", "10.43.0.0/16", vec!["10.42.0.0/24", "10.42.2.0/24"], Some("10.42.1.0/24")),
            ("10.42.0.0/16", "10.42.0.0/23", vec![], Some("10.42.2.0/24")),
            ("10.42.0.0/16", "10.43.0.0/16", vec!["10.42.0.0/23"], Some("10.42.2.0/24")),
            ("10.42.0.0/24", "10.43.0.0/16", vec!["10.42.0.0/24"], None),
            ("fd00::/56", "fd01::/112", vec!["fd00::/64"], Some("fd00:0:0:1::/64")),
        ];
        for (cluster, services, taken, expected) in rows {
            assert_eq!(free(cluster, services, &taken).as_deref(), expected, "{cluster} {taken:?}");
        }
    }

    #[test]
    fn a_node_has_what_its_object_lists() {
        let rows = [
            (json!({}), vec![]),
            (json!({"podCIDR": "10.42.1.0/24"}), vec!["10.42.1.0/24"]),
            (
                json!({"podCIDR": "10.42.1.0/24", "podCIDRs": ["10.42.1.0/24", "fd42:0:0:1::/64"]}),
                vec!["10.42.1.0/24", "fd42:0:0:1::/64"],
            ),
        ];
        for (spec, expected) in rows {
            let node: Node = serde_json::from_value(json!({"metadata": {}, "spec": spec})).unwrap();
            let found: Vec<_> = ranges(&node).iter().map(ToString::to_string).collect();
            assert_eq!(found, expected);
        }
    }
}
