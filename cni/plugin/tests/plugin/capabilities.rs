//! What may be asked for beyond an interface, alone and behind another plugin.

use std::net::{TcpListener, UdpSocket};

use serde_json::{Value, json};
use weft_cni_netlink::namespace;
use weft_tests_harness::netns::Netns;
use weft_tests_harness::require;

use crate::calls::{self, Node, addresses_of, conf, dual};
use crate::pod;

/// A host beyond the node, on a link of their own: 192.0.2.2 and 2001:db8::2; the node has .1 and ::1 there.
fn outside(node: &Node) -> Netns {
    let outside = Netns::new("out").unwrap();
    let peer = outside.name().to_owned();
    calls::ip_in(&node.netns, &["link", "add", "up0", "type", "veth", "peer", "name", "up0", "netns", &peer]);
    for (netns, last) in [(&node.netns, "1"), (&outside, "2")] {
        calls::ip_in(netns, &["link", "set", "up0", "up"]);
        calls::ip_in(netns, &["addr", "add", &format!("192.0.2.{last}/24"), "dev", "up0"]);
        calls::ip_in(netns, &["addr", "add", &format!("2001:db8::{last}/64"), "dev", "up0", "nodad"]);
    }
    outside
}

/// Listens in a pod, on every address.
fn listen(pod: &Netns, port: u16) -> TcpListener {
    namespace::within(&pod.path(), || TcpListener::bind(("::", port)).unwrap()).unwrap()
}

fn with_ports(mut config: Value, ports: Value) -> Value {
    config["runtimeConfig"] = json!({"portMappings": ports});
    config
}

#[test]
fn a_host_port_leads_to_its_pod_from_everywhere() {
    if !require("cni::hostport", &["root", "ip", "nft", "ipv6"]) {
        return;
    }
    let (node, a, b) = (Node::new(), pod(), pod());
    let outside = outside(&node);
    node.warm_up_with(&dual(&node));
    let before = node.state();
    let config = with_ports(
        dual(&node),
        json!([
            {"hostPort": 8080, "containerPort": 80, "protocol": "tcp"},
            {"hostPort": 8081, "containerPort": 80, "protocol": "tcp", "hostIP": "192.0.2.1"},
            {"hostPort": 8082, "containerPort": 80, "protocol": "TCP", "hostIP": "0.0.0.0"},
        ]),
    );
    let result = node.ok("ADD", "a", Some(&a), &config);
    node.ok("ADD", "b", Some(&b), &dual(&node));
    let _listener = listen(&a, 80);
    // The pod itself, its neighbour, the node, who is beyond it.
    for (name, from) in
        [("itself", &a), ("another pod", &b), ("the node", &node.netns), ("outside", &outside)]
    {
        for (target, answers) in [
            ("192.0.2.1:8080", true),
            ("[2001:db8::1]:8080", true),
            ("192.0.2.1:8081", true),
            ("[2001:db8::1]:8081", false),
            ("192.0.2.1:8082", true),
            ("[2001:db8::1]:8082", false),
            ("192.0.2.1:80", false),
        ] {
            assert_eq!(calls::reaches(from, target), answers, "{name} to {target}");
        }
    }
    assert!(calls::reaches(&b, "10.42.1.1:8080") && !calls::reaches(&b, "10.42.1.1:8081"));
    assert!(calls::reaches(&node.netns, "127.0.0.1:8080") && !calls::reaches(&node.netns, "127.0.0.1:8081"));

    let mut check = config.clone();
    check["prevResult"] = result;
    node.ok("CHECK", "a", Some(&a), &check);
    let flush =
        node.netns.command("nft").unwrap().args(["flush", "map", "ip", "weft-hostports", "any"]).status();
    assert!(flush.unwrap().success());
    assert_eq!(node.error("CHECK", "a", Some(&a), &check), 101);

    // The caller need not say again at DEL what it asked for.
    node.ok("DEL", "a", Some(&a), &dual(&node));
    node.ok("DEL", "b", Some(&b), &dual(&node));
    assert_eq!((node.leases(), node.state()), (0, before));
    assert!(!calls::reaches(&outside, "192.0.2.1:8081"));
}

#[test]
fn a_host_port_of_udp_leads_there_and_back() {
    if !require("cni::hostport_udp", &["root", "ip", "nft", "ipv6"]) {
        return;
    }
    let (node, a) = (Node::new(), pod());
    let outside = outside(&node);
    let ports = json!([{"hostPort": 5353, "containerPort": 53, "protocol": "udp"}]);
    node.ok("ADD", "a", Some(&a), &with_ports(dual(&node), ports));
    let server = namespace::within(&a.path(), || UdpSocket::bind(("::", 53)).unwrap()).unwrap();
    server.set_read_timeout(Some(calls::AT_ONCE)).unwrap();
    for (from, to) in [(&outside, "192.0.2.1:5353"), (&outside, "[2001:db8::1]:5353"), (&a, "192.0.2.1:5353")]
    {
        let wildcard = if to.starts_with('[') { "[::]:0" } else { "0.0.0.0:0" };
        let client = namespace::within(&from.path(), || UdpSocket::bind(wildcard).unwrap()).unwrap();
        client.set_read_timeout(Some(calls::AT_ONCE)).unwrap();
        // Connected: an answer from elsewhere than where the question went is not taken.
        client.connect(to).unwrap();
        client.send(b"ping").unwrap();
        let mut buffer = [0; 16];
        let (read, peer) = server.recv_from(&mut buffer).unwrap();
        server.send_to(&buffer[..read], peer).unwrap();
        assert_eq!(client.recv(&mut buffer).unwrap(), 4, "{to}");
    }
}

/// A flow of UDP has no end that the kernel could see: it must not stay where it once went.
#[test]
fn a_flow_of_udp_follows_its_host_port() {
    if !require("cni::hostport_flow", &["root", "ip", "nft", "ipv6"]) {
        return;
    }
    let (node, a, b) = (Node::new(), pod(), pod());
    let outside = outside(&node);
    let with_udp = |port: u16| {
        with_ports(dual(&node), json!([{"hostPort": port, "containerPort": 53, "protocol": "udp"}]))
    };
    // From now on the kernel tracks flows.
    node.ok("ADD", "other", Some(&b), &with_udp(5999));
    node.ok("DEL", "other", Some(&b), &with_udp(5999));
    for (wildcard, to) in [("0.0.0.0:0", "192.0.2.1:5353"), ("[::]:0", "[2001:db8::1]:5353")] {
        let client = namespace::within(&outside.path(), || UdpSocket::bind(wildcard).unwrap()).unwrap();
        client.send_to(b"to nobody", to).unwrap();
        for (id, pod) in [("a", &a), ("b", &b)] {
            node.ok("ADD", id, Some(pod), &with_udp(5353));
            let server = namespace::within(&pod.path(), || UdpSocket::bind(("::", 53)).unwrap()).unwrap();
            server.set_read_timeout(Some(calls::AT_ONCE)).unwrap();
            client.send_to(id.as_bytes(), to).unwrap();
            let mut buffer = [0; 16];
            let (read, _) =
                server.recv_from(&mut buffer).unwrap_or_else(|error| panic!("{id} {to}: {error}"));
            assert_eq!(&buffer[..read], id.as_bytes());
            node.ok("DEL", id, Some(pod), &with_udp(5353));
        }
    }
}

#[test]
fn a_host_port_opens_no_way_to_loopback() {
    if !require("cni::loopback", &["root", "ip", "nft"]) {
        return;
    }
    let (node, a, b) = (Node::new(), pod(), pod());
    let ports = json!([{"hostPort": 8080, "containerPort": 80}]);
    node.ok("ADD", "a", Some(&a), &with_ports(conf(&node), ports));
    node.ok("ADD", "b", Some(&b), &conf(&node));
    let listener =
        namespace::within(&node.netns.path(), || TcpListener::bind("127.0.0.1:0").unwrap()).unwrap();
    // A pod with every right sends its own loopback addresses out to the node.
    namespace::within(&b.path(), || {
        std::fs::write("/proc/sys/net/ipv4/conf/eth0/route_localnet", "1").unwrap();
    })
    .unwrap();
    calls::ip_in(&b, &["addr", "del", "127.0.0.1/8", "dev", "lo"]);
    calls::ip_in(&b, &["route", "add", "127.0.0.1/32", "via", "10.42.1.1", "dev", "eth0"]);
    let private = listener.local_addr().unwrap().to_string();
    assert!(!calls::reaches(&b, &private));
    assert!(calls::reaches(&node.netns, &private));
    // It is the guard that keeps it out, not something else.
    let flush =
        node.netns.command("nft").unwrap().args(["flush", "chain", "ip", "weft-hostports", "guard"]).status();
    assert!(flush.unwrap().success() && calls::reaches(&b, &private));
}

#[test]
fn a_host_port_is_one_pods_only_and_gc_frees_it() {
    if !require("cni::hostport_taken", &["root", "ip", "nft"]) {
        return;
    }
    let (node, a, b) = (Node::new(), pod(), pod());
    let config = with_ports(conf(&node), json!([{"hostPort": 8080, "containerPort": 80}]));
    node.ok("ADD", "a", Some(&a), &config);
    let attached = node.state();
    assert_eq!(node.error("ADD", "b", Some(&b), &config), 11);
    assert_eq!((node.leases(), node.state()), (1, attached));
    assert!(!calls::links(&b).contains("eth0"));
    let mut gc = conf(&node);
    gc["cni.dev/valid-attachments"] = json!([]);
    node.ok("GC", "", None, &gc);
    assert_eq!((node.leases(), node.mapped()), (0, vec![]));
    node.ok("ADD", "b", Some(&b), &config);
}

#[test]
fn traffic_is_bounded_both_ways() {
    if !require("cni::bandwidth", &["root", "ip", "tc"]) {
        return;
    }
    let (node, a) = (Node::new(), pod());
    let mut config = conf(&node);
    config["runtimeConfig"] = json!({"bandwidth": {
        "ingressRate": 8_000_000, "ingressBurst": 800_000, "egressRate": 16_000_000, "egressBurst": 0,
    }});
    let result = node.ok("ADD", "a", Some(&a), &config);
    let port = result["interfaces"][1]["name"].as_str().unwrap();
    let shown = |netns: &Netns, device: &str| {
        let output = netns.command("tc").unwrap().args(["qdisc", "show", "dev", device]).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(shown(&node.netns, port).contains("rate 8Mbit burst 100000b"), "{}", shown(&node.netns, port));
    assert!(shown(&a, "eth0").contains("rate 16Mbit"), "{}", shown(&a, "eth0"));
    calls::connect(&a, &node.netns, "10.42.1.1");
    config["prevResult"] = result.clone();
    node.ok("CHECK", "a", Some(&a), &config);
    let gone = a.command("tc").unwrap().args(["qdisc", "del", "dev", "eth0", "root"]).status().unwrap();
    assert!(gone.success());
    assert_eq!(node.error("CHECK", "a", Some(&a), &config), 101);
}

#[test]
fn addresses_and_names_are_as_asked_for() {
    if !require("cni::asked", &["root", "ip"]) {
        return;
    }
    let (mut node, a, b) = (Node::new(), pod(), pod());
    let mut config = conf(&node);
    config["runtimeConfig"] = json!({
        "mac": "02:00:00:00:00:07",
        "dns": {"servers": ["10.43.0.10"], "searches": ["a.svc.cluster.local"], "options": ["ndots:5"]},
    });
    let result = node.ok("ADD", "a", Some(&a), &config);
    assert_eq!(result["interfaces"][2]["mac"], "02:00:00:00:00:07");
    let dns = json!({
        "nameservers": ["10.43.0.10"], "search": ["a.svc.cluster.local"], "options": ["ndots:5"],
    });
    assert_eq!(result["dns"], dns);
    assert!(calls::links(&a).contains("02:00:00:00:00:07"));
    calls::connect(&node.netns, &a, &addresses_of(&result)[0]);

    node.args = "IgnoreUnknown=1;K8S_POD_NAME=b;WHATEVER=x;IP=10.42.1.99;MAC=02:00:00:00:00:08";
    let mut config = conf(&node);
    config["dns"] = json!({"nameservers": ["192.0.2.53"], "domain": "a.example"});
    let result = node.ok("ADD", "b", Some(&b), &config);
    assert_eq!(addresses_of(&result), ["10.42.1.99"]);
    assert_eq!(result["interfaces"][2]["mac"], "02:00:00:00:00:08");
    assert_eq!(result["dns"], config["dns"]);
    calls::connect(&node.netns, &b, "10.42.1.99");
    node.args = "WHATEVER=x";
    assert_eq!(node.error("DEL", "b", Some(&b), &config), 4);
}

#[test]
fn behind_another_plugin_it_adds_what_it_is_asked_for() {
    if !require("cni::chained", &["root", "ip", "nft", "/usr/lib/cni/bridge"]) {
        return;
    }
    let (mut node, a) = (Node::new(), pod());
    let outside = outside(&node);
    let ours = std::mem::replace(&mut node.program, "/usr/lib/cni/bridge".into());
    let first = calls::reference(&node);
    let attached = node.ok("ADD", "a", Some(&a), &first);
    let reference = std::mem::replace(&mut node.program, ours);
    let before = node.state();

    let mut config = json!({
        "cniVersion": "1.0.0", "name": "weft", "type": "weft-cni", "stateDir": node.folder(),
        "runtimeConfig": {
            "portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}],
            "bandwidth": {"ingressRate": 8_000_000, "egressRate": 8_000_000},
        },
    });
    assert_eq!(node.error("ADD", "a", Some(&a), &config), 7, "nobody was called before");
    config["prevResult"] = attached.clone();
    assert_eq!(node.ok("ADD", "a", Some(&a), &config), attached);
    let _listener = listen(&a, 80);
    for (from, target) in
        [(&outside, "192.0.2.1:8080"), (&a, "192.0.2.1:8080"), (&node.netns, "127.0.0.1:8080")]
    {
        assert!(calls::reaches(from, target), "{} to {target}", from.name());
    }
    node.ok("CHECK", "a", Some(&a), &config);

    let mut not_first = conf(&node);
    not_first["prevResult"] = attached.clone();
    assert_eq!(node.error("ADD", "b", Some(&a), &not_first), 7);
    let mut asks = config.clone();
    asks["runtimeConfig"] = json!({"mac": "02:00:00:00:00:07"});
    assert_eq!(node.error("ADD", "a", Some(&a), &asks), 2);

    for _ in 0..2 {
        node.ok("DEL", "a", Some(&a), &config);
    }
    assert_eq!(node.state(), before);
    assert!(!calls::reaches(&outside, "192.0.2.1:8080"));
    node.program = reference;
    node.ok("DEL", "a", Some(&a), &first);
}
