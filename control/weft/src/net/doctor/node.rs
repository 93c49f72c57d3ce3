//! A node's facts, judged. Pure, but for the ways to its peers, which the node's kernel is asked for.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use k8s_openapi::api::core::v1::Node;
use kube::ResourceExt as _;
use weft_agent_dataplane::observe::health::{Device, Health};
use weft_agent_dataplane::observe::path::Path;
use weft_agent_dataplane::observe::wire::Request;
use weft_agent_dataplane::{BRIDGE, OVERLAY};

use super::Finding;
use crate::net::reach::NodeHandle;
use crate::net::why::addresses;

/// The oldest kernel that the programs were seen to run on: Debian 12's.
const KERNEL: (u32, u32) = (6, 1);
/// Of a map that refuses what is too much, this part full is to be looked at.
const FULL_PERCENT: usize = 80;
/// What tunnels over IPv4 and over IPv6 add to a packet.
const OVERHEADS_BYTES: [u32; 2] = [50, 70];
/// First port that translated packets leave the node with.
const NAT_PORTS_FROM: u32 = 61_000;

/// Everything that the node's own facts say.
pub(super) fn judge(health: &Health) -> Vec<Finding> {
    let mut findings = vec![kernel(health), cgroups(health), pins(health), hooks(health)];
    findings.extend(maps(health));
    findings.extend(sysctls(health));
    findings.extend(devices(&health.devices));
    findings
}

fn kernel(health: &Health) -> Finding {
    let mut numbers = health.kernel.split(['.', '-']).map_while(|part| part.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    let (major, minor) = KERNEL;
    if version < KERNEL {
        let says = format!("it is {}, and the programs need {major}.{minor}", health.kernel);
        return Finding::fail("kernel", says, "take a newer kernel");
    }
    match health.sysctls.get("net/core/bpf_jit_enable").map(String::as_str) {
        Some("0") => Finding::warn(
            "kernel",
            format!("{}, but its eBPF compiler is off", health.kernel),
            "set net.core.bpf_jit_enable to 1",
        ),
        _ => Finding::ok("kernel", health.kernel.clone()),
    }
}

fn cgroups(health: &Health) -> Finding {
    match &health.cgroup2 {
        None => Finding::fail("cgroup", "no cgroup2 is mounted", "mount one at /sys/fs/cgroup/unified"),
        Some(_) if !health.node_cgroup => Finding::fail(
            "cgroup",
            "the node's cgroup is gone",
            "start its agent again: sockets in pods are not served",
        ),
        Some(path) => Finding::ok("cgroup", format!("cgroup2 at {}", path.display())),
    }
}

fn pins(health: &Health) -> Finding {
    match (health.bpffs, health.configured) {
        (false, _) => {
            Finding::fail("bpffs", "the pins are on no bpffs", "start the node's agent: it mounts one")
        }
        (true, false) => Finding::fail(
            "bpffs",
            "the programs do not know their node, and do nothing",
            "start its agent again",
        ),
        (true, true) => Finding::ok("bpffs", "maps and links are pinned"),
    }
}

fn hooks(health: &Health) -> Finding {
    let wrong: Vec<String> = health
        .hooks
        .iter()
        .filter_map(|hook| Some(format!("{} at {}: {}", hook.program, hook.place, hook.missing.as_ref()?)))
        .collect();
    if wrong.is_empty() {
        return Finding::ok("hooks", format!("{} programs are attached", health.hooks.len()));
    }
    Finding::fail("hooks", wrong.join("; "), "start the node's agent again: it attaches what is missing")
}

fn maps(health: &Health) -> Vec<Finding> {
    let full =
        health.maps.iter().filter(|map| !map.forgets && map.entries * 100 > map.most as usize * FULL_PERCENT);
    let mut findings: Vec<Finding> = full
        .map(|map| {
            let says = format!("{} holds {} of {} entries", map.map, map.entries, map.most);
            Finding::warn(
                "maps",
                says,
                "have fewer Services or endpoints: what finds no room is retried, not served",
            )
        })
        .collect();
    if findings.is_empty() {
        let of = |part: &str| {
            health.maps.iter().filter(|map| map.map.contains(part)).map(|map| map.entries).sum::<usize>()
        };
        let says =
            format!("{} Service entries, {} backends, {} flows", of("_svc_"), of("_back_"), of("_flow_"));
        findings.push(Finding::ok("maps", says));
    }
    findings
}

fn sysctls(health: &Health) -> Vec<Finding> {
    let value = |name: &str| health.sysctls.get(name).map(String::as_str);
    let mut findings = Vec::new();
    if value("net/ipv4/ip_forward") == Some("0") {
        let advice = "set net.ipv4.ip_forward to 1, and see what turned it off";
        findings.push(Finding::fail("sysctl", "the node forwards no IPv4 packets", advice));
    }
    if value("net/ipv4/conf/all/rp_filter") == Some("1") {
        let advice = "set net.ipv4.conf.all.rp_filter to 2 or 0";
        let says = "packets are dropped that come in by another device than answers leave by";
        findings.push(Finding::warn("sysctl", says, advice));
    }
    let last =
        value("net/ipv4/ip_local_port_range").and_then(|range| range.split(' ').nth(1)?.parse::<u32>().ok());
    if last.is_some_and(|last| last >= NAT_PORTS_FROM) {
        let says = "net.ipv4.ip_local_port_range reaches into the ports of translated packets";
        findings.push(Finding::warn("sysctl", says, format!("end it below {NAT_PORTS_FROM}")));
    }
    if findings.is_empty() {
        findings.push(Finding::ok("sysctl", "forwarding is on, port ranges are apart"));
    }
    findings
}

fn devices(devices: &[Device]) -> Vec<Finding> {
    let named = |name: &str| devices.iter().find(|device| device.name == name);
    let Some(bridge) = named(BRIDGE) else {
        let advice = "see whether the node has got a range of pod addresses (`kubectl describe node`)";
        return vec![Finding::fail("devices", format!("the pods' bridge {BRIDGE} is not there"), advice)];
    };
    let mut findings = Vec::new();
    if named(OVERLAY).is_some_and(|overlay| overlay.leaves_checksums == Some(false)) {
        let says = format!("{OVERLAY} leaves no checksums to the network card, which costs processor time");
        let advice = "if the agent's log says that the card breaks them, give it other firmware or another driver; else turn them on by ethtool";
        findings.push(Finding::warn("checksums", says, advice));
    }
    match named(OVERLAY) {
        Some(overlay) if !overlay.running => {
            findings.push(Finding::fail("devices", format!("{OVERLAY} carries no packets"), "set it up"));
        }
        // Pods of nodes that route natively: what is too large for a tunnel is told by the routes.
        Some(overlay) if OVERHEADS_BYTES.contains(&bridge.mtu_bytes.saturating_sub(overlay.mtu_bytes)) => {
            let (pods, tunnels) = (bridge.mtu_bytes, overlay.mtu_bytes);
            let says = format!("pods send packets of {pods} bytes, of {tunnels} by tunnels");
            findings.push(Finding::ok("mtu", says));
        }
        Some(overlay) if overlay.mtu_bytes < bridge.mtu_bytes => {
            let says = format!(
                "{BRIDGE} takes packets of {} bytes, and {OVERLAY} only {}",
                bridge.mtu_bytes, overlay.mtu_bytes
            );
            findings.push(Finding::warn(
                "mtu",
                says,
                format!("set the MTU of {BRIDGE} to {}", overlay.mtu_bytes),
            ));
        }
        Some(_) => {
            findings.push(Finding::ok("mtu", format!("pods send packets of {} bytes", bridge.mtu_bytes)))
        }
        None => findings.push(Finding::ok("devices", format!("{BRIDGE}, and no overlay: the node is alone"))),
    }
    findings
}

/// Whether the node's routes lead to the pods of every other node, through the tunnel to that node.
pub(super) fn peers(node: &NodeHandle, all: &[Node], health: &Health) -> Vec<Finding> {
    let mut findings = Vec::new();
    let tunnels = health.devices.iter().find(|device| device.name == OVERLAY).map(|device| device.mtu_bytes);
    let (mut by_tunnel, mut by_link) = (0, 0);
    for peer in all.iter().filter(|peer| peer.name_any() != node.name) {
        let name = peer.name_any();
        let listed =
            peer.spec.iter().flat_map(|spec| spec.pod_cidrs.iter().flatten().chain(spec.pod_cidr.iter()));
        let mut ranges: Vec<IpNetwork> = listed.filter_map(|range| range.parse().ok()).collect();
        ranges.sort();
        ranges.dedup();
        let mut narrow = None;
        for range in ranges {
            let asked = node.ask::<Path>(&Request::Path { to: second(range) });
            narrow = narrow.or(asked.as_ref().ok().and_then(|path| narrower(path, tunnels)));
            match asked {
                Ok(path) => match toward(&path, peer, range) {
                    None if path.tunnel.is_some() => by_tunnel += 1,
                    None => by_link += 1,
                    Some(says) => {
                        let advice =
                            "start the node's agent again: it puts routes, neighbours and forwarding entries";
                        findings.push(Finding::fail("overlay", format!("to {name}: {says}"), advice));
                    }
                },
                Err(error) => {
                    findings.push(Finding::fail("overlay", format!("{error:#}"), "start the node's agent"))
                }
            }
        }
        if let Some((takes, tunnel)) = narrow {
            let says = format!("to {name}: tunnels take packets of {takes} bytes, and of {tunnel} elsewhere");
            let advice = "give all links between the nodes one MTU; until then each pod is told by its first packet that is too large";
            findings.push(Finding::warn("mtu", says, advice));
        }
    }
    match node.silent(all) {
        Ok(silent) if silent.is_empty() => {}
        Ok(silent) => {
            let names = silent.into_iter().collect::<Vec<_>>().join(", ");
            let says = format!("{names} does not answer: endpoints there are left out here");
            findings.push(Finding::fail(
                "nodes",
                says,
                "see whether the node lives and its link carries packets",
            ));
        }
        Err(error) => findings.push(Finding::fail("nodes", format!("{error:#}"), "start the node's agent")),
    }
    for (good, way) in [(by_tunnel, "by tunnels"), (by_link, "over their link")] {
        if good > 0 {
            let says = format!("{good} ranges of pods on other nodes are reached {way}");
            findings.push(Finding::ok("overlay", says));
        }
    }
    findings
}

/// The second address of a range: a pod's, whether there is one or not.
fn second(range: IpNetwork) -> IpAddr {
    match range {
        IpNetwork::V4(range) => IpAddr::V4((u32::from(range.network()) + 2).into()),
        IpNetwork::V6(range) => IpAddr::V6((u128::from(range.network()) + 2).into()),
    }
}

/// What a tunnel takes that is narrower than its device, and what that takes.
fn narrower(path: &Path, tunnels: Option<u32>) -> Option<(u32, u32)> {
    let (takes, tunnel) = (path.mtu_bytes?, tunnels?);
    (path.tunnel.is_some() && takes < tunnel).then_some((takes, tunnel))
}

/// What is wrong with the way to a peer's pods.
fn toward(path: &Path, peer: &Node, range: IpNetwork) -> Option<String> {
    if path.device.is_none() {
        return Some(format!("there is no route to its pods ({range})"));
    }
    if let Some(missing) = &path.missing {
        return Some(missing.clone());
    }
    if path.gateway.is_some_and(|gateway| addresses(peer).contains(&gateway)) {
        return None;
    }
    let Some(tunnel) = path.tunnel else {
        let device = path.device.as_deref().unwrap_or("?");
        return Some(format!("its pods ({range}) are routed to {device}, not into the overlay"));
    };
    if !addresses(peer).contains(&tunnel) {
        return Some(format!("the tunnel leads to {tunnel}, which is not its address"));
    }
    None
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use k8s_openapi::jiff::Timestamp;
    use weft_agent_dataplane::observe::health::{Fill, Hook};
    use weft_agent_dataplane::observe::path::Way;

    use super::super::Level;
    use super::*;

    fn device(name: &str, mtu_bytes: u32) -> Device {
        let leaves_checksums = (name == OVERLAY).then_some(true);
        Device { name: name.to_owned(), kind: String::new(), mtu_bytes, running: true, leaves_checksums }
    }

    fn healthy() -> Health {
        let sysctl = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        Health {
            time: Timestamp::UNIX_EPOCH,
            kernel: "6.18.5-cloud".to_owned(),
            cgroup2: Some("/sys/fs/cgroup".into()),
            node_cgroup: true,
            bpffs: true,
            configured: true,
            hooks: vec![Hook { program: "weft_connect4".to_owned(), place: "/".to_owned(), missing: None }],
            maps: vec![Fill { map: "weft_svc_2".to_owned(), entries: 10, most: 100, forgets: false }],
            devices: vec![device(BRIDGE, 1450), device(OVERLAY, 1450)],
            sysctls: BTreeMap::from([
                sysctl("net/ipv4/ip_forward", "1"),
                sysctl("net/ipv4/ip_local_port_range", "32768 60999"),
                sysctl("net/ipv4/conf/all/rp_filter", "0"),
            ]),
        }
    }

    /// The findings that are not ok, as level and subject.
    fn wrong(change: impl FnOnce(&mut Health)) -> Vec<(Level, &'static str)> {
        let mut health = healthy();
        change(&mut health);
        let findings = judge(&health).into_iter().filter(|finding| finding.level != Level::Ok);
        findings.map(|finding| (finding.level, finding.what)).collect()
    }

    #[test]
    fn a_tunnel_that_takes_less_than_others_is_seen() {
        let path = |tunnel: Option<&str>, mtu_bytes| Path {
            to: [10, 42, 1, 2].into(),
            way: Way::Device,
            device: None,
            gateway: None,
            source: None,
            mtu_bytes,
            running: true,
            tunnel: tunnel.map(|ip| ip.parse().unwrap()),
            missing: None,
        };
        let rows = [
            (path(Some("10.44.0.3"), Some(1_350)), Some(1_450), Some((1_350, 1_450))),
            (path(Some("10.44.0.3"), Some(1_450)), Some(1_450), None),
            (path(None, Some(1_350)), Some(1_450), None),
            (path(Some("10.44.0.3"), None), Some(1_450), None),
            (path(Some("10.44.0.3"), Some(1_350)), None, None),
        ];
        for (path, tunnels, expected) in rows {
            assert_eq!(narrower(&path, tunnels), expected, "{path:?}");
        }
    }

    #[test]
    fn each_fact_is_judged_alone() {
        assert_eq!(wrong(|_| {}), []);
        assert_eq!(wrong(|h| h.kernel = "5.10.0-30-amd64".to_owned()), [(Level::Fail, "kernel")]);
        assert_eq!(wrong(|h| h.cgroup2 = None), [(Level::Fail, "cgroup")]);
        assert_eq!(wrong(|h| h.node_cgroup = false), [(Level::Fail, "cgroup")]);
        assert_eq!(wrong(|h| h.configured = false), [(Level::Fail, "bpffs")]);
        assert_eq!(wrong(|h| h.hooks[0].missing = Some("gone".to_owned())), [(Level::Fail, "hooks")]);
        assert_eq!(wrong(|h| h.maps[0].entries = 81), [(Level::Warn, "maps")]);
        assert_eq!(wrong(|h| h.devices[1].mtu_bytes = 1399), [(Level::Warn, "mtu")]);
        assert_eq!(wrong(|h| h.devices[1].leaves_checksums = Some(false)), [(Level::Warn, "checksums")]);
        assert_eq!(wrong(|h| h.devices[1].leaves_checksums = None), [], "an earlier agent's answer");
        assert_eq!(wrong(|h| h.devices[0].mtu_bytes = 1500), [], "a node that routes natively");
        assert_eq!(wrong(|h| h.devices.clear()), [(Level::Fail, "devices")]);
        let set = |name: &'static str, value: &'static str| {
            move |h: &mut Health| drop(h.sysctls.insert(name.to_owned(), value.to_owned()))
        };
        assert_eq!(wrong(set("net/ipv4/ip_forward", "0")), [(Level::Fail, "sysctl")]);
        assert_eq!(wrong(set("net/ipv4/ip_local_port_range", "1024 65535")), [(Level::Warn, "sysctl")]);
    }
}
