//! The built program against the kernel: every command, failures undone, kills at any moment, and the reference plugin first.
//!
//! A "node" is a network namespace of its own, and so is each pod; the machine's own namespace is never touched.
#![expect(clippy::unwrap_used, reason = "a test fails where it stands")]

#[path = "plugin/calls.rs"]
mod calls;
#[path = "plugin/capabilities.rs"]
mod capabilities;
#[path = "plugin/chain.rs"]
mod chain;
#[path = "plugin/cnitool.rs"]
mod cnitool;

use std::time::{Duration, Instant};

use calls::{Node, addresses_of, conf};
use serde_json::{Value, json};
use weft_tests_harness::netns::Netns;
use weft_tests_harness::require;

fn pod() -> Netns {
    Netns::new("pod").unwrap()
}

#[test]
fn a_pod_is_attached_checked_and_detached() {
    if !require("cni::life", &["root", "ip"]) {
        return;
    }
    let (node, a, b) = (Node::new(), pod(), pod());
    node.warm_up();
    let before = node.state();
    let result = node.ok("ADD", "a", Some(&a), &conf(&node));
    assert_eq!(result["cniVersion"], "1.1.0");
    assert_eq!(result["interfaces"].as_array().unwrap().len(), 3);
    assert_eq!(result["interfaces"][2]["sandbox"], a.path().to_str().unwrap());
    assert_eq!(result["ips"][0]["gateway"], "10.42.1.1");
    let address = result["ips"][0]["address"].as_str().unwrap().to_owned();
    assert!(address.ends_with("/24"));
    // No packet of a new pod may be lost, neither to the node nor from it.
    calls::connect(&a, &node.netns, "10.42.1.1");
    calls::connect(&node.netns, &a, address.trim_end_matches("/24"));

    let other = node.ok("ADD", "b", Some(&b), &conf(&node));
    calls::connect(&b, &a, address.trim_end_matches("/24"));
    assert_ne!(other["ips"][0]["address"], address.as_str());

    let mut check = conf(&node);
    check["prevResult"] = result.clone();
    node.ok("CHECK", "a", Some(&a), &check);
    calls::ip_in(&a, &["route", "del", "default"]);
    assert_eq!(node.error("CHECK", "a", Some(&a), &check), 101);
    assert_eq!(node.error("CHECK", "stranger", Some(&a), &check), 101);

    node.ok("DEL", "a", Some(&a), &conf(&node));
    node.ok("DEL", "a", Some(&a), &conf(&node));
    assert!(!calls::links(&a).contains("eth0"));
    // A namespace that is gone is no reason to fail.
    drop(b);
    node.ok("DEL", "b", None, &conf(&node));
    node.ok("DEL", "never", None, &conf(&node));
    assert_eq!(node.state(), before);
    assert_eq!(node.leases(), 0);
}

#[test]
fn a_pod_has_an_address_of_each_family() {
    if !require("cni::dual", &["root", "ip", "ipv6"]) {
        return;
    }
    let (node, a, b) = (Node::new(), pod(), pod());
    let config = calls::dual(&node);
    node.warm_up_with(&config);
    let before = node.state();
    let result = node.ok("ADD", "a", Some(&a), &config);
    let [v4, v6]: [String; 2] = addresses_of(&result).try_into().unwrap();
    assert_eq!(result["ips"][1]["gateway"], "fd00:42:0:1::1");
    assert_eq!(result["ips"][1]["address"], format!("{v6}/64"));
    assert_eq!(result["routes"][1], json!({"dst": "::/0", "gw": "fd00:42:0:1::1"}));
    // No packet may be lost, and none may wait for the detection of a duplicate.
    for (gateway, address) in [("fd00:42:0:1::1", &v6), ("10.42.1.1", &v4)] {
        calls::connect(&a, &node.netns, gateway);
        calls::connect(&node.netns, &a, address);
    }
    let other = addresses_of(&node.ok("ADD", "b", Some(&b), &config));
    calls::connect(&a, &b, &other[1]);
    calls::connect(&b, &a, &v6);
    assert_eq!(calls::sysctl(&a, "ipv6/conf/eth0/accept_ra"), "0");
    assert_eq!(calls::sysctl(&node.netns, "ipv6/conf/weft0/accept_ra"), "0");
    assert_eq!(calls::sysctl(&node.netns, "ipv6/conf/all/forwarding"), "1");

    let mut check = config.clone();
    check["prevResult"] = result;
    node.ok("CHECK", "a", Some(&a), &check);
    calls::ip_in(&a, &["-6", "route", "del", "default"]);
    assert_eq!(node.error("CHECK", "a", Some(&a), &check), 101);
    node.ok("DEL", "a", Some(&a), &config);
    node.ok("DEL", "b", Some(&b), &config);
    assert_eq!((node.leases(), node.state()), (0, before));

    // IPv6 alone, in a network of its own.
    let mut alone = config.clone();
    alone["ipam"] = alone["ipam"]["ranges"][1].clone();
    (alone["name"], alone["bridge"]) = (json!("six"), json!("weft6"));
    alone["ipam"]["subnet"] = json!("fd00:42:0:2::/64");
    alone["ipam"]["gateway"] = json!("fd00:42:0:2::1");
    let six = addresses_of(&node.ok("ADD", "a", Some(&a), &alone));
    assert_eq!(six.len(), 1);
    calls::connect(&a, &node.netns, "fd00:42:0:2::1");
    calls::connect(&node.netns, &a, &six[0]);
}

/// A bridge loses its carrier with its last port, and the kernel takes up to a second to give it back.
#[test]
fn the_first_pod_of_a_bridge_loses_no_packet_either() {
    if !require("cni::first", &["root", "ip"]) {
        return;
    }
    let node = Node::new();
    let config = calls::dual(&node);
    for round in 0..20 {
        let (pod, id) = (pod(), format!("f{round}"));
        node.ok("ADD", &id, Some(&pod), &config);
        calls::connect(&pod, &node.netns, if round % 2 == 0 { "10.42.1.1" } else { "fd00:42:0:1::1" });
        node.ok("DEL", &id, Some(&pod), &config);
    }
}

#[test]
fn hairpin_lets_a_pod_reach_itself_by_way_of_the_bridge() {
    if !require("cni::hairpin", &["root", "ip", "bridge"]) {
        return;
    }
    let (node, a) = (Node::new(), pod());
    node.ok("ADD", "a", Some(&a), &conf(&node));
    let shown = node.netns.command("bridge").unwrap().args(["-d", "link"]).output().unwrap();
    let shown = String::from_utf8(shown.stdout).unwrap();
    assert!(shown.contains("hairpin on"), "{shown}");
    assert!(shown.contains("mtu 1450"), "{shown}");
}

#[test]
fn results_come_in_the_callers_version() {
    if !require("cni::versions", &["root", "ip"]) {
        return;
    }
    let node = Node::new();
    for version in ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        let pod = pod();
        let mut config = conf(&node);
        config["cniVersion"] = json!(version);
        let result = node.ok("ADD", "a", Some(&pod), &config);
        assert_eq!(result["cniVersion"], version);
        let family = if version < "1.0.0" { json!("4") } else { Value::Null };
        assert_eq!(result["ips"][0]["version"], family);
        node.ok("DEL", "a", Some(&pod), &config);
    }
    let spoken = node.ok("VERSION", "", None, &json!({"cniVersion": "9.9.9"}));
    assert_eq!(spoken["cniVersion"], "9.9.9");
    assert_eq!(spoken["supportedVersions"], json!(["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"]));
}

#[test]
fn bad_input_has_its_code_and_changes_nothing() {
    if !require("cni::bad", &["root", "ip"]) {
        return;
    }
    let (node, a) = (Node::new(), pod());
    node.warm_up();
    let before = node.state();
    let with = |field: &str, value: Value| {
        let mut config = conf(&node);
        config[field] = value;
        config
    };
    assert_eq!(node.error_of_text("ADD", "a", Some(&a), "{not json"), 6);
    assert_eq!(node.error("ADD", "a", Some(&a), &with("cniVersion", json!("2.0.0"))), 1);
    assert_eq!(node.error("ADD", "a", Some(&a), &with("mtu", json!("x"))), 6);
    assert_eq!(node.error("ADD", "a", Some(&a), &with("ipam", json!({}))), 7);
    assert_eq!(node.error("ADD", "../a", Some(&a), &conf(&node)), 4);
    assert_eq!(node.error("ADD", "a", None, &conf(&node)), 4);
    assert_eq!(node.error("FROB", "a", Some(&a), &conf(&node)), 4);
    assert_eq!(node.error("CHECK", "a", Some(&a), &with("cniVersion", json!("0.3.1"))), 1);
    assert_eq!(node.error("GC", "", None, &with("cniVersion", json!("1.0.0"))), 1);
    assert_eq!(node.error_in("ADD", "a", "/run/netns/not-there", &conf(&node)), 3);
    assert_eq!(node.error_in("ADD", "a", "/etc/hostname", &conf(&node)), 100);
    assert_eq!(node.error("ADD", "a", Some(&a), &with("runtimeConfig", json!({"ips": ["10.9.9.9/24"]}))), 7);
    assert_eq!(node.leases(), 0);
    assert_eq!(node.state(), before);
}

#[test]
fn a_failed_add_undoes_itself_and_nothing_else() {
    if !require("cni::undo", &["root", "ip"]) {
        return;
    }
    let (node, a, taken) = (Node::new(), pod(), pod());
    node.warm_up();
    let before = node.state();
    // The name is taken in the pod: the pair can't be made.
    calls::ip_in(&taken, &["link", "add", "eth0", "type", "bridge"]);
    assert_eq!(node.error("ADD", "t", Some(&taken), &conf(&node)), 100);
    assert_eq!((node.leases(), node.state()), (0, before));
    assert!(calls::links(&taken).contains("eth0"));

    // A second ADD of the same attachment fails, and the first goes on.
    node.ok("ADD", "a", Some(&a), &conf(&node));
    let attached = node.state();
    assert_eq!(node.error("ADD", "a", Some(&a), &conf(&node)), 100);
    assert_eq!((node.leases(), node.state()), (1, attached));
    calls::connect(&a, &node.netns, "10.42.1.1");
}

#[test]
fn gc_removes_what_is_not_valid_and_status_says_whether_there_is_room() {
    if !require("cni::gc", &["root", "ip"]) {
        return;
    }
    let node = Node::new();
    let mut config = calls::dual(&node);
    config["ipam"]["ranges"][0]["subnet"] = json!("10.42.1.0/29");
    let pods: Vec<Netns> = (0..5).map(|_| pod()).collect();
    for (n, pod) in pods.iter().enumerate() {
        node.ok("STATUS", "", None, &config);
        node.ok("ADD", &format!("c{n}"), Some(pod), &config);
    }
    let one_more = pod();
    assert_eq!(node.error("STATUS", "", None, &config), 50);
    assert_eq!(node.error("ADD", "more", Some(&one_more), &config), 11);
    let mut gc = config.clone();
    gc["cni.dev/valid-attachments"] =
        json!([{"containerID": "c1", "ifname": "eth0"}, {"containerID": "c2", "ifname": "eth1"}]);
    node.ok("GC", "", None, &gc);
    assert_eq!(node.leases(), 2);
    let attached: Vec<bool> = pods.iter().map(|pod| calls::links(pod).contains("eth0")).collect();
    assert_eq!(attached, [false, true, false, false, false]);
    node.ok("STATUS", "", None, &config);
    node.ok("ADD", "more", Some(&one_more), &config);
    // Without a list none is valid: so libcni says it.
    node.ok("GC", "", None, &config);
    assert_eq!((node.leases(), calls::links(&pods[1]).contains("eth0")), (0, false));
}

#[test]
fn an_address_can_be_asked_for() {
    if !require("cni::ips", &["root", "ip"]) {
        return;
    }
    let (node, a, b) = (Node::new(), pod(), pod());
    let mut config = conf(&node);
    config["runtimeConfig"] = json!({"ips": ["10.42.1.77/24"]});
    assert_eq!(node.ok("ADD", "a", Some(&a), &config)["ips"][0]["address"], "10.42.1.77/24");
    assert_eq!(node.error("ADD", "b", Some(&b), &config), 7);
    let mut config = calls::dual(&node);
    config["runtimeConfig"] = json!({"ips": ["fd00:42:0:1::77/64", "10.42.1.7/28"]});
    let got = node.ok("ADD", "b", Some(&b), &config);
    assert_eq!(addresses_of(&got), ["10.42.1.7", "fd00:42:0:1::77"]);
}

#[test]
fn adds_side_by_side_get_an_address_each() {
    if !require("cni::parallel", &["root", "ip"]) {
        return;
    }
    let node = Node::new();
    let pods: Vec<Netns> = (0..16).map(|_| pod()).collect();
    let mut got: Vec<String> = std::thread::scope(|scope| {
        let add = |(n, pod): (usize, &'_ Netns)| node.ok("ADD", &format!("c{n}"), Some(pod), &conf(&node));
        let threads: Vec<_> = pods.iter().enumerate().map(|one| scope.spawn(move || add(one))).collect();
        let results = threads.into_iter().map(|thread| thread.join().unwrap());
        results.map(|result| result["ips"][0]["address"].to_string()).collect()
    });
    got.sort();
    got.dedup();
    assert_eq!(got.len(), 16);
}

/// A call for each system call that may change something, killed before it.
#[test]
fn kill_9_between_any_two_steps_leaks_nothing() {
    if !require("cni::kill", &["root", "ip", "nft", "strace"]) {
        return;
    }
    let node = Node::new();
    // 13 addresses: a leak would soon end the test.
    let mut config = calls::dual(&node);
    config["runtimeConfig"] = json!({"portMappings": [{"hostPort": 8080, "containerPort": 80}]});
    let mut gc = config.clone();
    gc["cni.dev/valid-attachments"] = json!([]);
    let pod = pod();
    node.warm_up_with(&config);
    let before = node.state();
    let (mut kills, mut leases, mut pairs, mut ports) = (0, 0, 0, 0);
    for (verb, step) in ["ADD", "DEL"].into_iter().flat_map(|verb| calls::STEPS.map(|step| (verb, step))) {
        for n in 1.. {
            let id = format!("k{verb}-{step}-{n}");
            if verb == "DEL" {
                node.ok("ADD", &id, Some(&pod), &config);
            }
            let killed = node.killed_before(verb, &id, &pod, &config, (step, n));
            if verb == "ADD" {
                leases += usize::from(node.leases() > 0);
                pairs += usize::from(calls::links(&pod).contains("eth0"));
                ports += usize::from(!node.mapped().is_empty());
            }
            match n % 3 {
                0 => drop(node.ok("DEL", &id, Some(&pod), &config)),
                // The caller has forgotten the container altogether.
                1 => drop(node.ok("GC", "", None, &gc)),
                // The namespace is gone first, as when the pod's processes die with their caller.
                _ => drop(node.ok("DEL", &id, None, &config)),
            }
            assert_eq!((node.leases(), node.state()), (0, before.clone()), "{verb} killed before {step} {n}");
            assert!(!calls::links(&pod).contains("eth0"), "{verb} killed before {step} {n}");
            if !killed {
                break;
            }
            kills += 1;
        }
    }
    eprintln!("{kills} kills; ADD left a lease {leases}, a pair {pairs}, a host port {ports} times");
    assert!(
        kills > leases && leases > pairs && pairs > ports && ports > 0,
        "the kills hit too few of the steps"
    );
    // The whole pool can still be given out.
    let config = calls::dual(&node);
    let pods: Vec<Netns> = (0..13).map(|_| calls::bare_pod()).collect();
    for (n, pod) in pods.iter().enumerate() {
        node.ok("ADD", &format!("last{n}"), Some(pod), &config);
    }
}

/// The same black box first against the reference plugins, then ours.
#[test]
fn the_reference_plugins_pass_the_same_and_how_long_each_takes() {
    if !require("cni::reference", &["root", "ip", "/usr/lib/cni/bridge"]) {
        return;
    }
    const ROUNDS: u32 = 30;
    let mut took: Vec<[Duration; 2]> = Vec::new();
    for ours in [false, true] {
        let mut node = Node::new();
        let config = if ours { conf(&node) } else { calls::reference(&node) };
        if !ours {
            node.program = "/usr/lib/cni/bridge".into();
        }
        let (mut adds, mut dels) = (Vec::new(), Vec::new());
        for round in 0..ROUNDS {
            let pod = pod();
            let id = format!("r{round}");
            let before = Instant::now();
            let result = node.ok("ADD", &id, Some(&pod), &config);
            adds.push(before.elapsed());
            let address = addresses_of(&result).remove(0);
            // The reference loses a new pod's first packets; it is given the time to send them again.
            let patience = if ours { calls::AT_ONCE } else { Duration::from_secs(10) };
            calls::connect_within(&pod, &node.netns, "10.42.1.1", patience);
            calls::connect_within(&node.netns, &pod, &address, patience);
            let before = Instant::now();
            node.ok("DEL", &id, Some(&pod), &config);
            dels.push(before.elapsed());
            assert!(!calls::links(&pod).contains("eth0"));
        }
        adds.sort();
        dels.sort();
        took.push([adds[adds.len() / 2], dels[dels.len() / 2]]);
    }
    let ratio = |n: usize| took[0][n].as_secs_f64() / took[1][n].as_secs_f64();
    eprintln!("ADD: reference {:?}, ours {:?}: {:.1} times as fast", took[0][0], took[1][0], ratio(0));
    eprintln!("DEL: reference {:?}, ours {:?}: {:.1} times as fast", took[0][1], took[1][1], ratio(1));
}
