//! A node in a network namespace with four pods, and a service proxy on it: weft's, or another one, fed by an API server in this
//! process. What a benchmark of the proxy alone needs, and no cluster.

pub(crate) mod api;
pub(crate) mod program;

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener};

use anyhow::Context as _;
use serde_json::{Value, json};
use weft_tests_harness::netns::{Netns, ip};

use crate::service::traffic::{Backends, Client};

/// Backends of the Service that is asked, each in a pod of its own.
pub(crate) const BACKENDS: usize = 4;
/// The Service's port, and the backends'.
pub(crate) const PORT: u16 = 80;
pub(crate) const TARGET_PORT: u16 = 8080;
/// The address of the Service that is asked.
pub(crate) const VIP: Ipv4Addr = Ipv4Addr::new(10, 43, 255, 1);
/// Its name: the last one of all in order.
pub(crate) const NAME: &str = "zz";

/// The node's namespace, with the pods behind its bridge.
pub(crate) struct Node {
    pub(crate) netns: Netns,
    /// Kept for their namespaces.
    _pods: Vec<Netns>,
    _backends: Backends,
}

/// Address of a pod.
pub(crate) fn pod(number: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 42, 0, u8::try_from(10 + number).unwrap_or(u8::MAX))
}

/// Addresses of all pods.
pub(crate) fn pods() -> Vec<Ipv4Addr> {
    (0..BACKENDS).map(pod).collect()
}

/// The Service that is asked.
pub(crate) fn vip() -> SocketAddrV4 {
    SocketAddrV4::new(VIP, PORT)
}

impl Node {
    /// Makes it, with a server in each pod.
    pub(crate) fn new(label: &str) -> anyhow::Result<Self> {
        let netns = Netns::new(label)?;
        let node = netns.name();
        let run = |command: String| ip(&command.split(' ').collect::<Vec<_>>());
        run(format!("-n {node} link add br0 type bridge"))?;
        run(format!("-n {node} addr add 10.42.0.1/16 dev br0"))?;
        run(format!("-n {node} link set br0 up"))?;
        run(format!("-n {node} route add 10.43.0.0/16 dev br0"))?;
        let (mut spaces, mut all) = (Vec::new(), Vec::new());
        for (number, address) in pods().into_iter().enumerate() {
            let space = Netns::new(label)?;
            let name = space.name();
            run(format!("-n {node} link add p{number} type veth peer name eth0 netns {name}"))?;
            run(format!("-n {node} link set p{number} master br0 up"))?;
            run(format!("-n {name} addr add {address}/16 dev eth0"))?;
            run(format!("-n {name} link set eth0 up"))?;
            run(format!("-n {name} route add default via 10.42.0.1"))?;
            all.push((address, space.path()));
            spaces.push(space);
        }
        let backends = Backends::within(&all, TARGET_PORT)?;
        Ok(Self { netns, _pods: spaces, _backends: backends })
    }

    /// Clients in the node's namespace.
    pub(crate) fn client(&self) -> anyhow::Result<Client> {
        Client::new(&self.netns.path())
    }

    /// A listener on the node's loopback.
    pub(crate) fn listen(&self) -> anyhow::Result<(TcpListener, SocketAddr)> {
        let bound = self.netns.thread(|| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("listen"))?;
        let listener = bound.join().map_err(|panic| anyhow::anyhow!("{panic:?}"))??;
        let address = listener.local_addr()?;
        Ok((listener, address))
    }
}

/// Cluster address of one of the Services that only fill the tables.
pub(crate) fn filler_address(number: usize) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 43, 0, 1)) + u32::try_from(number).unwrap_or(0))
}

/// Address of an endpoint of such a Service; nobody is there.
pub(crate) fn filler_endpoint(number: usize, endpoint: usize) -> Ipv4Addr {
    let offset = u32::try_from(number * (BACKENDS + 1) + endpoint).unwrap_or(0);
    Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 64, 0, 1)) + offset)
}

/// Name of such a Service.
pub(crate) fn filler_name(number: usize) -> String {
    format!("s{number:05}")
}

/// A Service object.
pub(crate) fn service(name: &str, address: Ipv4Addr) -> Value {
    json!({"apiVersion": "v1", "kind": "Service",
        "metadata": {"namespace": "default", "name": name, "uid": format!("service-{name}"), "resourceVersion": "1",
            "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": {"type": "ClusterIP", "clusterIP": address, "clusterIPs": [address], "ipFamilies": ["IPv4"],
            "ipFamilyPolicy": "SingleStack", "sessionAffinity": "None", "internalTrafficPolicy": "Cluster",
            "selector": {"app": name}, "ports": [{"name": "http", "port": PORT, "targetPort": TARGET_PORT, "protocol": "TCP"}]},
        "status": {"loadBalancer": {}}})
}

/// Its EndpointSlice.
pub(crate) fn slice(service: &str, addresses: &[Ipv4Addr], version: u64) -> Value {
    let endpoints: Vec<_> = addresses
        .iter()
        .map(|address| {
            json!({"addresses": [address], "nodeName": "node-b",
                "conditions": {"ready": true, "serving": true, "terminating": false},
                "targetRef": {"kind": "Pod", "namespace": "default", "name": format!("pod-{address}"), "uid": format!("pod-{address}")}})
        })
        .collect();
    json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"namespace": "default", "name": format!("{service}-1"), "uid": format!("slice-{service}"),
            "resourceVersion": version.to_string(), "generation": 1, "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": {"kubernetes.io/service-name": service, "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io"}},
        "endpoints": endpoints, "ports": [{"name": "http", "port": TARGET_PORT, "protocol": "TCP"}]})
}

/// Lists of so many Services of four endpoints each; the one that is asked is the last.
pub(crate) fn lists(count: usize) -> (Vec<Value>, Vec<Value>) {
    let fillers = count.saturating_sub(1);
    let mut services: Vec<_> =
        (0..fillers).map(|number| service(&filler_name(number), filler_address(number))).collect();
    let mut slices: Vec<_> = (0..fillers)
        .map(|number| {
            let endpoints: Vec<_> = (0..BACKENDS).map(|endpoint| filler_endpoint(number, endpoint)).collect();
            slice(&filler_name(number), &endpoints, 1)
        })
        .collect();
    services.push(service(NAME, VIP));
    slices.push(slice(NAME, &pods(), 1));
    (services, slices)
}
