use super::*;

fn link(index: u32, name: &str, kind: &str) -> Link {
    Link {
        index,
        name: name.to_owned(),
        mac: Some(Mac([2, 0, 0, 0, 0, 9])),
        mtu_bytes: 1_500,
        up: true,
        running: true,
        loopback: false,
        master: None,
        peer_index: None,
        peer_namespace: None,
        kind: kind.to_owned(),
        queue: String::new(),
    }
}

fn devices() -> Devices {
    let edge = [(1, "eth0"), (2, "weft0"), (3, "weft.vx"), (4, "veth9"), (5, "down")];
    let edge = edge.into_iter().map(|(index, name)| (index, name.to_owned())).collect();
    Devices { edge, bridge: 2, overlay: 3, ..Devices::default() }
}

#[test]
fn uplinks_are_the_edges_that_lead_outside() {
    let mut down = link(5, "down", "");
    down.up = false;
    let links = [
        link(1, "eth0", ""),
        link(2, "weft0", "bridge"),
        link(3, "weft.vx", "vxlan"),
        link(4, "veth9", "veth"),
        down,
        link(6, "no-address", ""),
    ];
    for (mode, expected) in [(Xdp::Auto, vec![1]), (Xdp::Always, vec![1, 4]), (Xdp::Never, vec![])] {
        let found: Vec<u32> = uplinks(mode, &devices(), &links).into_keys().collect();
        assert_eq!(found, expected, "{mode:?}");
    }
}

#[test]
fn a_pod_is_behind_the_port_that_has_its_hardware_address() {
    let (bridge, first, second) = (Mac([9; 6]), Mac([1; 6]), Mac([2; 6]));
    let at = |address: &str, mac| Neighbour { index: 2, address: address.parse().unwrap(), mac };
    let neighbours = [at("10.42.0.2", first), at("fd42::2", first), at("10.42.0.3", second)];
    let ports = [Port { index: 7, mtu_bytes: 1_450, pod: first }];
    let found = pods(bridge, &neighbours, &ports);
    let expected = XdpPod { ifindex: 7, mtu_bytes: 1_450, pod: [1; 6], bridge: [9; 6] };
    let address = |text: &str| Address::from(text.parse::<std::net::IpAddr>().unwrap());
    assert_eq!(
        found,
        BTreeMap::from([(address("10.42.0.2"), expected), (address("fd42::2"), expected)]),
        "one whose port takes no frames is left to tc"
    );
}

#[test]
fn only_what_differs_is_written() {
    let pod = |ifindex| XdpPod { ifindex, mtu_bytes: 1_450, pod: [1; 6], bridge: [9; 6] };
    let [a, b, c] = [1, 2, 3].map(|last| Address::v4([10, 42, 0, last]));
    let old = BTreeMap::from([(a, pod(1)), (b, pod(2))]);
    let new = BTreeMap::from([(b, pod(2)), (c, pod(3))]);
    assert_eq!(difference(&old, &new), (vec![a], vec![(c, pod(3))]));
    assert_eq!(difference(&new, &new), (vec![], vec![]));
    let moved = BTreeMap::from([(a, pod(4)), (b, pod(2))]);
    assert_eq!(difference(&old, &moved), (vec![], vec![(a, pod(4))]));
}

#[test]
fn modes_have_names() {
    let rows = [
        ("auto", Ok(Xdp::Auto)),
        ("always", Ok(Xdp::Always)),
        ("never", Ok(Xdp::Never)),
        ("on", Err(UnknownXdp)),
    ];
    for (text, expected) in rows {
        assert_eq!(text.parse::<Xdp>(), expected, "{text}");
        if let Ok(mode) = expected {
            assert_eq!(mode.to_string(), text);
        }
    }
}
