//! A node in a network namespace, with a pod on its bridge and a client outside, joined by veth pairs.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sched::{CloneFlags, setns};
use serde_json::{Value, json};
use weft_agent_dataplane::maps::kernel::KernelMaps;
use weft_agent_dataplane::node;
use weft_agent_dataplane::programs::{self, Programs};
use weft_agent_dataplane::reconcile::Reconciler;
use weft_agent_dataplane::tables::Tables;
use weft_ebpf_abi::{Address, NodeConfig};
use weft_tests_harness::artifact;
use weft_tests_harness::netns::{Netns, ip};

/// The node's bridge address.
pub(crate) const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 42, 0, 1);
/// The pod's address.
pub(crate) const POD: Ipv4Addr = Ipv4Addr::new(10, 42, 0, 2);
/// The node's address towards the client.
pub(crate) const NODE: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 1);
/// The client's address.
pub(crate) const CLIENT: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 2);
/// The same in IPv6.
pub(crate) const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfd42, 0, 0, 0, 0, 0, 0, 1);
/// The pod's.
pub(crate) const POD6: Ipv6Addr = Ipv6Addr::new(0xfd42, 0, 0, 0, 0, 0, 0, 2);
/// The node's towards the client.
pub(crate) const NODE6: Ipv6Addr = Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 1);
/// The client's.
pub(crate) const CLIENT6: Ipv6Addr = Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 2);
/// How long a connection may take that should succeed or be refused. An emulated machine takes its time.
pub(crate) const SOON: Duration = Duration::from_secs(5);

/// How long a datagram's answer may take.
const PATIENCE: Duration = Duration::from_secs(2);

/// The namespaces, and the folder of the pins.
pub(crate) struct Place {
    pub(crate) node: Netns,
    pub(crate) pod: Netns,
    pub(crate) client: Netns,
    pub(crate) pins: PathBuf,
    pub(crate) cgroup: PathBuf,
    _folder: tempfile::TempDir,
}

/// The dataplane's kernel side in that place.
pub(crate) struct Running {
    pub(crate) programs: Programs,
    pub(crate) reconciler: Reconciler<KernelMaps>,
}

impl Place {
    pub(crate) fn new(label: &str) -> anyhow::Result<Self> {
        let (node, pod, client) = (Netns::new(label)?, Netns::new(label)?, Netns::new(label)?);
        let (n, p, c) = (node.name(), pod.name(), client.name());
        for netns in [&node, &pod, &client] {
            // Else link-local addresses, which neighbour discovery uses, take a second to become usable.
            within(netns, || std::fs::write("/proc/sys/net/ipv6/conf/default/accept_dad", "0"))?;
        }
        let commands = [
            format!("-n {n} link add weft0 type bridge"),
            format!("-n {n} addr add {GATEWAY}/24 dev weft0"),
            format!("-n {n} addr add {GATEWAY6}/64 dev weft0"),
            format!("-n {n} link set weft0 up"),
            format!("-n {n} link add pod0 type veth peer name eth0 netns {p}"),
            format!("-n {n} link set pod0 master weft0 up"),
            format!("-n {p} addr add {POD}/24 dev eth0"),
            format!("-n {p} addr add {POD6}/64 dev eth0"),
            format!("-n {p} link set eth0 up"),
            format!("-n {p} route add default via {GATEWAY}"),
            format!("-n {p} route add default via {GATEWAY6}"),
            format!("-n {n} link add up0 type veth peer name eth0 netns {c}"),
            format!("-n {n} addr add {NODE}/24 dev up0"),
            format!("-n {n} addr add {NODE6}/64 dev up0"),
            format!("-n {n} link set up0 up"),
            format!("-n {c} addr add {CLIENT}/24 dev eth0"),
            format!("-n {c} addr add {CLIENT6}/64 dev eth0"),
            format!("-n {c} link set eth0 up"),
            format!("-n {c} route add default via {NODE}"),
            format!("-n {c} route add default via {NODE6}"),
        ];
        for command in &commands {
            ip(&command.split(' ').collect::<Vec<_>>())?;
        }
        within(&node, || std::fs::write("/proc/sys/net/ipv4/ip_forward", "1"))?;
        within(&node, || std::fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1"))?;
        let folder = tempfile::tempdir()?;
        let pins = folder.path().join("bpf");
        node::ensure_bpffs(&pins)?;
        let cgroup = node::cgroup2_mount()?.join("weft").join(n);
        Ok(Self { node, pod, client, pins, cgroup, _folder: folder })
    }

    /// Loads, attaches and adopts, as the agent does.
    pub(crate) fn start(&self) -> anyhow::Result<Running> {
        start(&self.node, &self.pins, &self.cgroup)
    }

    /// The same with a kernel that has no links for packets.
    pub(crate) fn start_by_filters(&self) -> anyhow::Result<Running> {
        start_with(&self.node, &self.pins, &self.cgroup, Programs::by_filters)
    }
}

/// What the node is, asked from its namespace.
pub(crate) fn identity(devices: &node::Devices, cgroup: &Path) -> anyhow::Result<NodeConfig> {
    Ok(NodeConfig {
        netns_cookie: node::netns_cookie()?,
        cgroup_id: node::cgroup_id(cgroup)?,
        bridge_ifindex: devices.bridge,
        overlay_ifindex: devices.overlay,
        ..NodeConfig::default()
    })
}

/// Loads, attaches and adopts in a node's namespace.
pub(crate) fn start(node: &Netns, pins: &Path, cgroup: &Path) -> anyhow::Result<Running> {
    start_with(node, pins, cgroup, |programs| programs)
}

fn start_with(
    node: &Netns,
    pins: &Path,
    cgroup: &Path,
    prepare: impl FnOnce(Programs) -> Programs + Send,
) -> anyhow::Result<Running> {
    let object = std::fs::read(artifact("weft.bpf.o").map_err(anyhow::Error::msg)?)?;
    within(node, || {
        let mut programs = prepare(Programs::load(&object, pins)?);
        let devices = node::devices(Some(weft_agent_dataplane::BRIDGE))?;
        programs.configure(identity(&devices, cgroup)?)?;
        programs.attach_sockets(&node::cgroup2_mount()?)?;
        programs.attach_edges(&devices.edge)?;
        let mut reconciler = Reconciler::adopt(Tables::new("node-a", Vec::new()), programs.maps()?)?;
        let addresses = devices.addresses.into_iter().map(Address::from);
        let v6 = [NODE6, GATEWAY6].map(|ip| Address::from(IpAddr::V6(ip)));
        reconciler.set_node_addresses(addresses.chain(v6).collect());
        Ok(Running { programs, reconciler })
    })
}

impl Drop for Place {
    fn drop(&mut self) {
        remove(&self.pins, &self.cgroup);
    }
}

/// Names of the pins of programs' places that begin so.
pub(crate) fn hook_pins(pins: &Path, start: &str) -> BTreeSet<String> {
    let entries = std::fs::read_dir(pins.join("links")).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with(start)).collect()
}

/// Removes what [`start`] leaves.
pub(crate) fn remove(pins: &Path, cgroup: &Path) {
    let _ = programs::remove(pins);
    let _ = nix::mount::umount2(pins, nix::mount::MntFlags::MNT_DETACH);
    let _ = std::fs::remove_dir(cgroup);
    // Stays while another node of the machine has its cgroup there.
    let _ = cgroup.parent().map(std::fs::remove_dir);
}

impl Running {
    /// Enters a Service with cluster address 10.43.0.`last`, over TCP and UDP, with these endpoints.
    pub(crate) fn service(
        &mut self,
        last: u8,
        node_port: u16,
        endpoints: &[SocketAddr],
    ) -> anyhow::Result<()> {
        let name = format!("s{last}");
        let port = |protocol: &str| json!({"name": protocol, "port": 80, "nodePort": node_port, "protocol": protocol});
        let service = json!({"metadata": {"namespace": "default", "name": name}, "spec": {"type": "NodePort",
            "clusterIP": format!("10.43.0.{last}"), "ports": [port("TCP"), port("UDP")]}});
        let changed = self.reconciler.tables.apply_service(&serde_json::from_str(&service.to_string())?);
        self.reconciler.mark(changed);
        let target = endpoints.first().map_or(1, SocketAddr::port);
        let target = |protocol: &str| json!({"name": protocol, "port": target, "protocol": protocol});
        let endpoints: Vec<Value> = endpoints
            .iter()
            .map(|e| json!({"addresses": [e.ip()], "nodeName": "node-a", "conditions": {"ready": true}}))
            .collect();
        let slice = json!({"addressType": "IPv4", "endpoints": endpoints, "ports": [target("TCP"), target("UDP")],
            "metadata": {"namespace": "default", "name": name, "labels": {"kubernetes.io/service-name": name}}});
        let changed = self.reconciler.tables.apply_slice(&serde_json::from_str(&slice.to_string())?);
        self.reconciler.mark(changed);
        self.sync()
    }

    /// Enters a Service or an EndpointSlice.
    pub(crate) fn apply(&mut self, object: Value) -> anyhow::Result<()> {
        let tables = &mut self.reconciler.tables;
        let changed: Vec<_> = if object.get("endpoints").is_some() {
            tables.apply_slice(&serde_json::from_str(&object.to_string())?)
        } else {
            tables.apply_service(&serde_json::from_str(&object.to_string())?).into_iter().collect()
        };
        self.reconciler.mark(changed);
        self.sync()
    }

    pub(crate) fn sync(&mut self) -> anyhow::Result<()> {
        let report = self.reconciler.sync();
        anyhow::ensure!(report.failed == 0 && !self.reconciler.is_dirty(), "{report:?}");
        Ok(())
    }

    pub(crate) fn drops(&self, reason: &str) -> u64 {
        self.programs.drops().unwrap()[reason]
    }
}

/// The cluster address of a Service of [`Running::service`].
pub(crate) fn vip(last: u8) -> SocketAddr {
    SocketAddr::from(([10, 43, 0, last], 80))
}

/// Runs `work` in a namespace, on a thread of its own.
pub(crate) fn within<T: Send>(netns: &Netns, work: impl FnOnce() -> T + Send) -> T {
    let path = netns.path();
    std::thread::scope(|scope| {
        let run = move || {
            enter(&path);
            work()
        };
        match scope.spawn(run).join() {
            Ok(value) => value,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

fn enter(path: &Path) {
    let file = std::fs::File::open(path).unwrap();
    setns(file, CloneFlags::CLONE_NEWNET).unwrap();
}

/// Answers every TCP connection and datagram at `address` in a namespace with `name`, as long as the test lives.
pub(crate) fn serve(netns: &Netns, address: impl Into<IpAddr>, name: &'static str) -> SocketAddr {
    let address = address.into();
    let (tcp, udp) = within(netns, || {
        let tcp = TcpListener::bind((address, 0)).unwrap();
        let udp = UdpSocket::bind(tcp.local_addr().unwrap()).unwrap();
        (tcp, udp)
    });
    let at = tcp.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in tcp.incoming() {
            let mut stream = stream.unwrap();
            std::thread::spawn(move || {
                let mut buffer = [0; 64];
                while let Ok(1..) = stream.read(&mut buffer) {
                    let from = stream.peer_addr().unwrap().ip();
                    if stream.write_all(format!("{name} {from}").as_bytes()).is_err() {
                        break;
                    }
                }
            });
        }
    });
    std::thread::spawn(move || {
        let mut buffer = [0; 64];
        while let Ok((_, from)) = udp.recv_from(&mut buffer) {
            let _ = udp.send_to(format!("{name} {}", from.ip()).as_bytes(), from);
        }
    });
    at
}

/// Connects from the calling thread's namespace and asks once.
pub(crate) fn ask_tcp(to: SocketAddr) -> std::io::Result<String> {
    ask_again(&mut TcpStream::connect_timeout(&to, SOON)?)
}

/// Asks once more over a connection.
pub(crate) fn ask_again(stream: &mut TcpStream) -> std::io::Result<String> {
    stream.set_read_timeout(Some(SOON))?;
    stream.write_all(b"?")?;
    let mut buffer = [0; 64];
    let count = stream.read(&mut buffer)?;
    if count == 0 {
        return Err(std::io::ErrorKind::UnexpectedEof.into());
    }
    Ok(String::from_utf8_lossy(&buffer[..count]).into_owned())
}

/// Asks over a connected UDP socket of its own.
pub(crate) fn ask_udp(to: SocketAddr) -> std::io::Result<String> {
    let socket = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
    socket.connect(to)?;
    ask_datagram(&socket)
}

/// A connected UDP socket.
pub(crate) fn connected_udp(to: SocketAddr) -> UdpSocket {
    let socket = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }).unwrap();
    socket.connect(to).unwrap();
    socket
}

/// Asks over a connected UDP socket.
pub(crate) fn ask_datagram(socket: &UdpSocket) -> std::io::Result<String> {
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.send(b"?")?;
    let mut buffer = [0; 64];
    let count = socket.recv(&mut buffer)?;
    Ok(String::from_utf8_lossy(&buffer[..count]).into_owned())
}
