//! NetworkPolicy in a real kernel: two pods on a bridge, their node, and packets between them in both families.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use weft_agent_dataplane::{Config, cleanup, run};
use weft_tests_harness::netns::{Netns, ip};
use weft_tests_harness::require;

use crate::NEEDS;
use crate::agent::{Api, config, eventually, get, service, slice};
use crate::place::{CLIENT, NODE, POD, POD6, Place, within};

/// The other pod.
const OTHER: Ipv4Addr = Ipv4Addr::new(10, 42, 0, 3);
const OTHER6: Ipv6Addr = Ipv6Addr::new(0xfd42, 0, 0, 0, 0, 0, 0, 3);
/// Who has no answer by then was dropped.
const SILENCE: Duration = Duration::from_millis(400);
/// How long an answer that is expected may take, on a machine that does much else.
const PATIENCE: Duration = Duration::from_secs(5);

/// A second pod; everybody serves ports 80 and 81 by TCP and UDP.
fn populate(place: &Place) -> anyhow::Result<Netns> {
    let other = Netns::new("po")?;
    let (n, o) = (place.node.name(), other.name());
    let commands = [
        format!("-n {n} link add pod1 type veth peer name eth0 netns {o}"),
        format!("-n {n} link set pod1 master weft0 up"),
        format!("-n {o} addr add {OTHER}/24 dev eth0"),
        format!("-n {o} link set eth0 up"),
        format!("-n {o} route add default via {}", crate::place::GATEWAY),
        format!("-n {o} addr add {OTHER6}/64 dev eth0 nodad"),
    ];
    for command in &commands {
        ip(&command.split(' ').collect::<Vec<_>>())?;
    }
    for netns in [&place.pod, &other, &place.client] {
        serve(netns);
    }
    Ok(other)
}

fn serve(netns: &Netns) {
    for port in [80, 81] {
        let at = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
        let (tcp, udp) = within(netns, || (TcpListener::bind(at).unwrap(), UdpSocket::bind(at).unwrap()));
        std::thread::spawn(move || {
            for stream in tcp.incoming() {
                std::thread::spawn(move || {
                    let mut stream = stream.unwrap();
                    let mut buffer = [0; 64];
                    while let Ok(count @ 1..) = stream.read(&mut buffer) {
                        if stream.write_all(&buffer[..count]).is_err() {
                            break;
                        }
                    }
                });
            }
        });
        std::thread::spawn(move || {
            let mut buffer = [0; 65_536];
            while let Ok((count, from)) = udp.recv_from(&mut buffer) {
                let _ = udp.send_to(&buffer[..count], from);
            }
        });
    }
}

fn tcp(from: &Netns, to: impl Into<IpAddr>, port: u16) -> bool {
    tcp_within(from, to.into(), port, PATIENCE)
}

fn no_tcp(from: &Netns, to: impl Into<IpAddr>, port: u16) -> bool {
    !tcp_within(from, to.into(), port, SILENCE)
}

fn tcp_within(from: &Netns, to: IpAddr, port: u16, patience: Duration) -> bool {
    let to = SocketAddr::new(to, port);
    within(from, || match TcpStream::connect_timeout(&to, patience) {
        Ok(mut stream) => {
            stream.set_read_timeout(Some(patience)).unwrap();
            stream.write_all(b"?").unwrap();
            stream.read(&mut [0; 8]).is_ok_and(|count| count == 1)
        }
        Err(error) => {
            assert!(matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::ConnectionRefused), "{error}");
            false
        }
    })
}

fn udp(from: &Netns, to: impl Into<IpAddr>, port: u16, bytes: usize) -> bool {
    udp_within(from, SocketAddr::new(to.into(), port), bytes, PATIENCE)
}

fn no_udp(from: &Netns, to: impl Into<IpAddr>, port: u16, bytes: usize) -> bool {
    !udp_within(from, SocketAddr::new(to.into(), port), bytes, SILENCE)
}

fn udp_within(from: &Netns, to: SocketAddr, bytes: usize, patience: Duration) -> bool {
    within(from, || {
        let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = UdpSocket::bind(any).unwrap();
        socket.set_read_timeout(Some(patience)).unwrap();
        socket.send_to(&vec![7; bytes], to).unwrap();
        socket.recv(&mut vec![0; 65_536]).is_ok_and(|count| count == bytes)
    })
}

/// Whether an echo request is answered.
fn ping(from: &Netns, to: impl Into<IpAddr>) -> bool {
    ping_within(from, to.into(), PATIENCE)
}

fn no_ping(from: &Netns, to: impl Into<IpAddr>) -> bool {
    !ping_within(from, to.into(), SILENCE)
}

fn ping_within(from: &Netns, to: IpAddr, patience: Duration) -> bool {
    use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage};
    use nix::sys::socket::{recv, sendto, setsockopt, socket, sockopt};
    use nix::sys::time::TimeValLike as _;
    use std::os::fd::AsRawFd as _;
    let to = SocketAddr::new(to, 0);
    let (family, protocol, request, answer, header) = if to.is_ipv4() {
        (AddressFamily::Inet, SockProtocol::Icmp, 8, 0, 20)
    } else {
        (AddressFamily::Inet6, SockProtocol::IcmpV6, 128, 129, 0)
    };
    // Type, checksum (IPv6's is the kernel's work), identifier and number.
    let sum = !(u16::from(request) * 256 + 0x1234 + 1);
    let [a, b] = sum.to_be_bytes();
    let packet = [request, 0, a, b, 0x12, 0x34, 0, 1];
    within(from, || {
        let socket = socket(family, SockType::Raw, SockFlag::empty(), protocol).unwrap();
        let patience = nix::sys::time::TimeVal::milliseconds(i64::try_from(patience.as_millis()).unwrap());
        setsockopt(&socket, sockopt::ReceiveTimeout, &patience).unwrap();
        sendto(socket.as_raw_fd(), &packet, &SockaddrStorage::from(to), MsgFlags::empty()).unwrap();
        let mut buffer = [0; 256];
        // Other ICMP comes by as well, such as neighbour discovery.
        while let Ok(count) = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
            let message = &buffer[header..count];
            if message.first() == Some(&answer) && message.get(4..6) == Some(&[0x12, 0x34]) {
                return true;
            }
        }
        false
    })
}

fn policy(name: &str, version: u32, spec: &Value) -> Value {
    json!({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "spec": spec,
        "metadata": {"namespace": "default", "name": name, "resourceVersion": version.to_string()}})
}

fn pod(name: &str, v4: Ipv4Addr, v6: Ipv6Addr, app: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Pod",
        "metadata": {"namespace": "default", "name": name, "uid": name, "resourceVersion": "4", "labels": {"app": app}},
        "spec": {"nodeName": "node-a", "containers": [{"name": "c", "ports": [{"name": "web", "containerPort": 80}]}]},
        "status": {"phase": "Running", "podIPs": [{"ip": v4}, {"ip": v6}]}})
}

/// A dataplane at work, on a runtime whose threads are in the node's namespace.
struct Agent {
    api: Api,
    shutdown: CancellationToken,
    running: tokio::task::JoinHandle<Result<(), weft_agent_dataplane::Error>>,
}

impl Agent {
    async fn start(config: &Config, policies: Vec<Value>) -> Self {
        let api = Api::default();
        api.list(
            "namespaces",
            vec![json!({"apiVersion": "v1", "kind": "Namespace",
            "metadata": {"name": "default", "resourceVersion": "2", "labels": {"team": "a"}}})],
        );
        api.list("pods", vec![pod("server", POD, POD6, "server"), pod("client", OTHER, OTHER6, "client")]);
        api.list("networkpolicies", policies);
        api.list("services", vec![service()]);
        api.list("endpointslices", vec![slice(&[SocketAddr::from((POD, 80))], "6")]);
        let (programmed, mut is_programmed) = watch::channel(false);
        let shutdown = CancellationToken::new();
        let running = tokio::spawn(run(config.clone(), api.client(), programmed, shutdown.clone()));
        tokio::time::timeout(Duration::from_secs(60), is_programmed.wait_for(|is| *is))
            .await
            .unwrap()
            .unwrap();
        Self { api, shutdown, running }
    }

    async fn put(&self, name: &str, version: u32, spec: &Value) {
        self.api.event("networkpolicies", "MODIFIED", &policy(name, version, spec)).await;
    }

    async fn delete(&self, name: &str) {
        self.api.event("networkpolicies", "DELETED", &policy(name, 1_000, &json!({"podSelector": {}}))).await;
    }

    async fn stop(self) {
        self.shutdown.cancel();
        self.running.await.unwrap().unwrap();
    }
}

fn in_node(place: &Place, work: impl Future<Output = ()> + Send) {
    within(&place.node, || {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(work);
    });
}

#[test]
fn policies_hold_in_both_families() {
    if !require("dataplane::policy", &NEEDS) {
        return;
    }
    let place = Place::new("pl").unwrap();
    let other = populate(&place).unwrap();
    let config = config(&place);
    in_node(&place, async {
        assert!(
            tcp(&other, POD, 80) && tcp(&other, POD6, 80) && udp(&other, POD, 80, 5) && ping(&other, POD6)
        );
        let agent = Agent::start(&config, Vec::new()).await;
        deny_in(&agent, &place, &other).await;
        allow_some(&agent, &place, &other).await;
        deny_out(&agent, &place, &other).await;
        ranges(&agent, &place, &other).await;
        on_trial(&agent, &other).await;
        agent.stop().await;
        cleanup(&config).await.unwrap();
        assert!(tcp(&other, POD, 80), "nothing is left of it");
    });
}

/// Nobody but the node gets in; what the pod begins is answered.
async fn deny_in(agent: &Agent, place: &Place, other: &Netns) {
    let select = json!({"matchLabels": {"app": "server"}});
    agent.put("in", 10, &json!({"podSelector": select, "policyTypes": ["Ingress"]})).await;
    eventually("isolation", || no_tcp(other, POD, 80)).await;
    assert!(no_tcp(other, POD6, 80) && no_udp(other, POD, 80, 5) && no_udp(other, POD6, 81, 5));
    assert!(no_ping(other, POD) && no_ping(other, POD6));
    assert!(no_tcp(&place.client, POD, 80), "nor from outside");
    assert!(tcp(&place.node, POD, 80) && tcp(&place.node, POD6, 80), "the node is let in: probes");
    assert!(udp(&place.node, POD, 80, 5) && ping(&place.node, POD));
    assert!(tcp(&place.pod, OTHER, 80) && tcp(&place.pod, OTHER6, 80), "answers come back");
    assert!(udp(&place.pod, OTHER, 80, 5) && udp(&place.pod, OTHER6, 80, 5));
    assert!(udp(&place.pod, OTHER, 80, 5_000) && udp(&place.pod, OTHER6, 80, 5_000), "in fragments too");
    assert!(ping(&place.pod, OTHER) && ping(&place.pod, OTHER6));
    assert!(tcp(&place.pod, CLIENT, 80));
    let refused = within(&place.pod, || {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.connect((OTHER, 9)).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.send(b"?").unwrap();
        socket.recv(&mut [0; 8]).unwrap_err().kind()
    });
    assert_eq!(refused, ErrorKind::ConnectionRefused, "an ICMP error about its own packet is let in");
}

/// One peer on one port, by number and by name.
async fn allow_some(agent: &Agent, place: &Place, other: &Netns) {
    let select = json!({"matchLabels": {"app": "server"}});
    let client = json!([{"podSelector": {"matchLabels": {"app": "client"}}}]);
    agent
        .put(
            "some",
            11,
            &json!({"podSelector": select, "ingress": [{"from": client, "ports": [{"port": "web"}]}]}),
        )
        .await;
    eventually("the allowed port", || tcp(other, POD, 80)).await;
    assert!(tcp(other, POD6, 80));
    assert!(
        no_tcp(other, POD, 81) && no_tcp(other, POD6, 81) && no_udp(other, POD, 80, 5) && no_ping(other, POD)
    );
    assert!(no_tcp(&place.client, POD, 80));
    agent.put("some", 12, &json!({"podSelector": select, "ingress": [{"from": client, "ports": [{"port": 79, "endPort": 90, "protocol": "UDP"}]}]})).await;
    eventually("the other protocol", || udp(other, POD, 81, 5)).await;
    assert!(udp(other, POD6, 80, 5) && udp(other, POD, 80, 5_000) && udp(other, POD6, 80, 5_000));
    assert!(no_tcp(other, POD, 80) && no_udp(&place.client, POD, 80, 5));
    agent.delete("some").await;
    agent.delete("in").await;
    eventually("freedom", || tcp(other, POD, 81)).await;
    assert!(tcp(&place.client, POD, 80) && ping(other, POD6));
}

async fn deny_out(agent: &Agent, place: &Place, other: &Netns) {
    let select = json!({"matchLabels": {"app": "client"}});
    agent.put("out", 20, &json!({"podSelector": select, "policyTypes": ["Egress"]})).await;
    eventually("isolation", || no_tcp(other, POD, 80)).await;
    assert!(
        no_tcp(other, POD6, 80)
            && no_udp(other, POD, 80, 5)
            && no_udp(other, POD6, 80, 5_000)
            && no_ping(other, POD6)
    );
    assert!(no_tcp(other, CLIENT, 80));
    assert!(tcp(&place.pod, OTHER, 80) && tcp(&place.pod, OTHER6, 81), "it answers who asks");
    assert!(
        udp(&place.pod, OTHER, 80, 5_000) && udp(&place.pod, OTHER6, 81, 5_000) && ping(&place.pod, OTHER6)
    );
    assert!(tcp(&place.node, OTHER, 80));
    assert!(ping(other, crate::place::GATEWAY), "its own node is always in reach");
    agent.put("out", 21, &json!({"podSelector": select, "policyTypes": ["Egress"], "egress": [{"ports": [{"port": "web"}]}]})).await;
    eventually("the named port of the destination", || tcp(other, POD, 80)).await;
    assert!(tcp(other, POD6, 80) && no_tcp(other, POD, 81) && no_tcp(other, CLIENT, 80));
    agent.delete("out").await;
    eventually("freedom", || tcp(other, POD, 81)).await;
}

async fn ranges(agent: &Agent, place: &Place, other: &Netns) {
    let select = json!({"matchLabels": {"app": "server"}});
    let blocks = json!([{"ipBlock": {"cidr": "192.168.0.0/16"}}, {"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.42.0.2/31"]}},
        {"ipBlock": {"cidr": "fd42::/64"}}]);
    agent.put("ranges", 30, &json!({"podSelector": select, "ingress": [{"from": blocks}]})).await;
    eventually("the exception", || no_tcp(other, POD, 80)).await;
    assert!(tcp(&place.client, POD, 80) && tcp(other, POD6, 80) && ping(other, POD6));
    agent.delete("ranges").await;
    eventually("freedom", || tcp(other, POD, 81)).await;
}

/// A policy on trial drops nothing, and says what it would have; what others dropped was counted too.
async fn on_trial(agent: &Agent, other: &Netns) {
    let mut trial =
        policy("trial", 40, &json!({"podSelector": {"matchLabels": {"app": "server"}}, "ingress": []}));
    trial["metadata"]["annotations"] = json!({"weft.dev/dry-run": "true"});
    agent.api.event("networkpolicies", "ADDED", &trial).await;
    let metric = "weft_policy_would_drop_packets_total{policy=\"default/trial\",direction=\"ingress\"}";
    let deadline = std::time::Instant::now() + Duration::from_secs(30);
    let metrics = loop {
        assert!(tcp(other, POD, 80) && udp(other, POD6, 81, 5));
        let metrics = get(10_249, "/metrics").await;
        let value = metrics.lines().find_map(|line| line.strip_prefix(metric)).unwrap_or("").trim();
        if value.parse::<u64>().is_ok_and(|count| count > 0) {
            break metrics;
        }
        assert!(std::time::Instant::now() < deadline, "it counts nothing: {metrics}");
    };
    for reason in ["policy_ingress", "policy_egress"] {
        let line = metrics.lines().find(|line| line.contains(&format!("reason=\"{reason}\""))).unwrap();
        assert!(!line.ends_with(" 0"), "{line}");
    }
    agent.delete("trial").await;
}

/// Sockets here are in no cgroup of the node, so their packets to Services are translated on the way.
#[test]
fn packets_to_services_are_judged_by_client_and_backend() {
    if !require("dataplane::policy-services", &NEEDS) {
        return;
    }
    let place = Place::new("ps").unwrap();
    let other = populate(&place).unwrap();
    let config = config(&place);
    in_node(&place, async {
        let agent = Agent::start(&config, Vec::new()).await;
        let cluster_ip = Ipv4Addr::new(10, 43, 0, 10);
        eventually("the Service", || tcp(&other, cluster_ip, 80)).await;
        let client = json!({"matchLabels": {"app": "client"}});
        let server = json!({"matchLabels": {"app": "server"}});
        let out = |to: Value| json!({"podSelector": client, "policyTypes": ["Egress"], "egress": [{"to": to, "ports": [{"port": 80}]}]});
        agent.put("out", 10, &out(json!([{"podSelector": {"matchLabels": {"app": "nobody"}}}]))).await;
        eventually("isolation", || no_tcp(&other, cluster_ip, 80)).await;
        assert!(no_tcp(&other, NODE, 30080), "nor by the node's own port");
        agent.put("out", 11, &out(json!([{"podSelector": server}]))).await;
        eventually("the backend", || tcp(&other, cluster_ip, 80)).await;
        assert!(tcp(&other, NODE, 30080));
        agent.delete("out").await;

        let into = |from: Value| json!({"podSelector": server, "ingress": [{"from": from}]});
        agent.put("in", 20, &into(json!([{"podSelector": client}]))).await;
        eventually("isolation", || no_tcp(&place.client, NODE, 30080)).await;
        assert!(tcp(&other, cluster_ip, 80), "the client is seen behind the node's address");
        agent.put("in", 21, &into(json!([{"ipBlock": {"cidr": format!("{CLIENT}/32")}}]))).await;
        eventually("the client outside", || tcp(&place.client, NODE, 30080)).await;
        assert!(no_tcp(&other, cluster_ip, 80));
        agent.stop().await;
        cleanup(&config).await.unwrap();
    });
}

#[test]
fn policies_outlive_the_agent_and_pods_wait_for_theirs() {
    if !require("dataplane::policy-restart", &NEEDS) {
        return;
    }
    let place = Place::new("pr").unwrap();
    let other = populate(&place).unwrap();
    let mut config = config(&place);
    in_node(&place, async {
        let deny = |version| policy("in", version, &json!({"podSelector": {}, "policyTypes": ["Ingress"]}));
        let agent = Agent::start(&config, vec![deny(10)]).await;
        eventually("isolation", || no_tcp(&other, POD, 80)).await;
        agent.stop().await;
        assert!(no_tcp(&other, POD, 80) && tcp(&place.node, POD, 80), "nobody runs, and it holds");

        config.gate = Some(weft_agent_dataplane::policy::Gate::default());
        let agent = Agent::start(&config, vec![deny(10)]).await;
        assert!(no_tcp(&other, POD, 80));
        late_pod(&agent, &config, &place, &other).await;
        agent.stop().await;
        cleanup(&config).await.unwrap();
    });
}

/// A pod that the API has no address of yet, and a policy that the watch has not told of.
async fn late_pod(agent: &Agent, config: &Config, place: &Place, other: &Netns) {
    let late = Netns::new("late").unwrap();
    let (n, l) = (place.node.name(), late.name());
    let address = Ipv4Addr::new(10, 42, 0, 9);
    let object = json!({"metadata": {"namespace": "default", "name": "late", "uid": "late", "labels": {"app": "late"}},
        "spec": {"nodeName": "node-a", "containers": [{"name": "c"}]}, "status": {"phase": "Pending"}});
    let object = Arc::new(serde_json::from_value(object).unwrap());
    agent.api.list("networkpolicies", vec![
        policy("in", 10, &json!({"podSelector": {}, "policyTypes": ["Ingress"]})),
        policy("late", 50, &json!({"podSelector": {"matchLabels": {"app": "late"}}, "ingress": [{"ports": [{"port": 80}]}]})),
    ]);
    let waits = tokio::spawn({
        let gate = config.gate.clone().unwrap();
        async move { gate.wait(object, vec![address.into()]).await }
    });
    for command in [
        format!("-n {n} link add late0 type veth peer name eth0 netns {l}"),
        format!("-n {n} link set late0 master weft0 up"),
        format!("-n {l} addr add {address}/24 dev eth0"),
        format!("-n {l} link set eth0 up"),
    ] {
        ip(&command.split(' ').collect::<Vec<_>>()).unwrap();
    }
    serve(&late);
    tokio::time::timeout(Duration::from_secs(60), waits).await.unwrap().unwrap().unwrap();
    assert!(no_tcp(other, address, 81), "isolated from its first packet on");
    assert!(tcp(other, address, 80), "and open where its policy says so");
    let pins = |place: &Place| {
        let all = std::fs::read_dir(place.pins.join("links")).unwrap().flatten();
        all.filter(|entry| entry.file_name().to_string_lossy().starts_with("pod_")).count()
    };
    assert_eq!(pins(place), 9);
    ip(&["-n", n, "link", "del", "late0"]).unwrap();
    eventually("removal of the pins", || pins(place) == 6).await;
}
