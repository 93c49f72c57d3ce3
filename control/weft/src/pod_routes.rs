//! The machine's routes to the pods of nodes in namespaces of their own: the API server, which is on no node, reaches pods by them.

use std::net::IpAddr;

use futures::{StreamExt as _, TryStreamExt as _};
use ipnetwork::IpNetwork;
use k8s_openapi::api::core::v1 as core;
use kube::ResourceExt as _;
use kube::runtime::watcher::Event;
use kube::runtime::{WatchStreamExt as _, watcher};
use tokio_util::sync::CancellationToken;
use weft_cni_netlink::{Netlink, Route};

use crate::network::UNDERLAY_BRIDGE;

/// A range of pods and the node that it is behind.
type Way = (IpNetwork, IpAddr);

/// Follows the nodes until shutdown. The routes go with the bridge.
pub(crate) async fn keep(client: kube::Client, shutdown: CancellationToken) -> anyhow::Result<()> {
    let nodes = kube::Api::<core::Node>::all(client);
    let mut events = watcher::watcher(nodes, watcher::Config::default()).default_backoff().boxed();
    while let Some(event) = shutdown.run_until_cancelled(events.try_next()).await {
        let outcome = match event {
            Ok(Some(Event::Apply(node) | Event::InitApply(node))) => change(&node, Netlink::put_route),
            Ok(Some(Event::Delete(node))) => change(&node, Netlink::delete_route),
            Ok(Some(Event::Init | Event::InitDone)) => Ok(()),
            Ok(None) => anyhow::bail!("the watch of the nodes ended"),
            Err(error) => {
                tracing::warn!(%error, "cannot watch the nodes; trying again");
                Ok(())
            }
        };
        if let Err(error) = outcome {
            tracing::warn!(%error, "cannot set the machine's route to a node's pods");
        }
    }
    Ok(())
}

fn change(
    node: &core::Node,
    apply: fn(&mut Netlink, &Route) -> Result<(), weft_cni_netlink::Error>,
) -> Result<(), weft_cni_netlink::Error> {
    let ways = ways(node);
    if ways.is_empty() {
        return Ok(());
    }
    tracing::debug!(node = node.name_any(), ?ways, "routes to the node's pods");
    let mut netlink = Netlink::open()?;
    let bridge = netlink.link(UNDERLAY_BRIDGE)?;
    for (range, gateway) in ways {
        let mut route = Route::new(range, bridge.index);
        route.gateway = Some(gateway);
        apply(&mut netlink, &route)?;
    }
    Ok(())
}

/// Each of a node's ranges, by its address of the same family.
fn ways(node: &core::Node) -> Vec<Way> {
    let spec = node.spec.as_ref();
    let ranges = spec.and_then(|spec| spec.pod_cidrs.as_ref()).into_iter().flatten();
    let addresses = node.status.as_ref().and_then(|status| status.addresses.as_ref());
    let internal: Vec<IpAddr> = addresses
        .into_iter()
        .flatten()
        .filter(|address| address.type_ == "InternalIP")
        .filter_map(|address| address.address.parse().ok())
        .collect();
    let gateway = |range: &IpNetwork| internal.iter().find(|ip| ip.is_ipv4() == range.is_ipv4()).copied();
    let ranges = ranges.filter_map(|range| range.parse().ok());
    ranges.filter_map(|range| Some((range, gateway(&range)?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_range_goes_to_the_address_of_its_family() {
        let node = serde_json::json!({
            "spec": {"podCIDRs": ["10.42.1.0/24", "fd00:10:42:1::/64"]},
            "status": {"addresses": [
                {"type": "Hostname", "address": "node-2"},
                {"type": "InternalIP", "address": "10.44.0.3"},
                {"type": "InternalIP", "address": "fd00:10:44::3"},
            ]},
        });
        let node: core::Node = serde_json::from_value(node).expect("a node");
        let text: Vec<String> = ways(&node).iter().map(|(range, via)| format!("{range} via {via}")).collect();
        assert_eq!(text, ["10.42.1.0/24 via 10.44.0.3", "fd00:10:42:1::/64 via fd00:10:44::3"]);
        assert!(ways(&core::Node::default()).is_empty());
    }
}
