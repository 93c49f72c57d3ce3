//! Peers, their addresses, and the ways to them.

use serde_json::json;
use weft_ebpf_abi::{Address, Tunnel};

use super::*;

fn node(name: &str, ranges: &[&str], addresses: &[&str]) -> Node {
    let addresses: Vec<_> = addresses.iter().map(|a| json!({"type": "InternalIP", "address": a})).collect();
    let object = json!({"metadata": {"name": name},
        "spec": {"podCIDR": ranges.first(), "podCIDRs": ranges}, "status": {"addresses": addresses}});
    serde_json::from_value(object).unwrap()
}

fn wanted(overlay: &Overlay) -> Vec<String> {
    let text = |peer: &Peer| {
        let pods: Vec<_> = peer.pods.iter().map(ToString::to_string).collect();
        format!("{} by {}", pods.join(" "), peer.address)
    };
    overlay.wanted().iter().map(text).collect()
}

#[test]
fn peers_are_reached_in_the_families_that_the_node_has_addresses_of() {
    let mut overlay = Overlay::new("a".to_owned(), "192.0.2.1".parse().unwrap(), Routing::Tunnel);
    overlay.apply_node(&node("a", &["10.42.0.0/24", "fd42::/64"], &["192.0.2.1", "fd44::1"]));
    overlay.apply_node(&node("b", &["10.42.1.0/24", "fd42:0:0:1::/64"], &["fd44::2", "192.0.2.2"]));
    overlay.apply_node(&node("c", &["10.42.2.0/24"], &["192.0.2.3"]));
    overlay.apply_node(&node("no-range", &[], &["192.0.2.4"]));
    overlay.apply_node(&node("other-family", &["10.42.5.0/24"], &["fd44::5"]));
    let mut devices = Devices::default();
    let rows: [(&[&str], &[&str]); 4] = [
        (&[], &[]),
        (&["10.42.0.1"], &["10.42.1.0/24 by 192.0.2.2", "10.42.2.0/24 by 192.0.2.3"]),
        (&["fd42::1"], &["fd42:0:0:1::/64 by 192.0.2.2"]),
        (
            &["10.42.0.1", "fd42::1"],
            &["10.42.1.0/24 fd42:0:0:1::/64 by 192.0.2.2", "10.42.2.0/24 by 192.0.2.3"],
        ),
    ];
    for (addresses, expected) in rows {
        devices.addresses = addresses.iter().map(|a| a.parse().unwrap()).collect();
        overlay.set_devices(&devices);
        assert_eq!(wanted(&overlay), expected, "{addresses:?}");
    }
    let [own, b, c] = [1, 2, 3].map(|last| Address::v4([192, 0, 2, last]));
    assert_eq!(overlay.tunnels(), [b, c].map(|peer| Tunnel { own, peer }));
}

#[test]
fn a_node_says_which_packets_it_understands() {
    let mut overlay = Overlay::new("a".to_owned(), "192.0.2.1".parse().unwrap(), Routing::Tunnel);
    for (said, direct) in
        [(None, false), (Some("0"), false), (Some(DIRECT_RETURN_VERSION), true), (Some("2"), false)]
    {
        let mut object = node("b", &["10.42.1.0/24"], &["192.0.2.2", "fd44::2"]);
        let annotation = said.map(|said| (DIRECT_RETURN.to_owned(), said.to_owned()));
        object.metadata.annotations = Some(annotation.into_iter().collect());
        overlay.dirty = false;
        overlay.apply_node(&object);
        let peer = &overlay.nodes["b"];
        assert_eq!((peer.direct, peer.addresses.len()), (direct, 2), "{said:?}");
    }
    // Until there is a way to them, its pods are known as the cluster's own, and so is it.
    let known: Vec<_> =
        overlay.direct().into_iter().map(|(range, takes)| format!("{range} {takes}")).collect();
    assert_eq!(known, ["10.42.1.0/24 0", "192.0.2.2/32 0", "fd44::2/128 0"]);
}

#[test]
fn hardware_addresses_follow_from_the_nodes_own() {
    assert_eq!(mac("10.44.0.2".parse().unwrap()).to_string(), "02:77:0a:2c:00:02");
    let macs: BTreeSet<_> = (2..=65_u16).map(|n| mac(IpAddr::from([0xfd44, 0, 0, 0, 0, 0, 0, n]))).collect();
    assert_eq!(macs.len(), 64, "the nodes of one machine all differ");
}
