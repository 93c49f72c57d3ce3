//! A node's role: runtime, kubelet, data plane and cluster DNS.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use weft_agent_dataplane as dataplane;
use weft_agent_dataplane::overlay::{DIRECT_RETURN, DIRECT_RETURN_VERSION};
use weft_agent_dns as dns;
use weft_agent_kubelet as kubelet;
use weft_agent_runtime::Runtime;
use weft_agent_runtime::builtin::{self, BuiltinRuntime};

use crate::artifacts::{self, Programs};
use crate::cli::AgentArgs;
use crate::cluster::{Cluster, DOMAIN, KUBELET_PORT};
use crate::paths::{NodePaths, Paths};
use crate::pki::{Authority, Identity, Subject};
use crate::ranges::PerFamily;
use crate::ways::Ways;
use crate::{kubeconfig, lock, logging, network, nodes, pki};

/// User and group of the service proxy, and of the cluster DNS.
const PROXY: (&str, &str) = ("system:kube-proxy", "system:node-proxier");
const DNS: (&str, &str) =
    ("system:serviceaccount:kube-system:kube-dns", "system:serviceaccounts:kube-system");
const NODES: &str = "system:nodes";
/// How long a container gets to end when the whole node is stopped.
const STOP_GRACE: Duration = Duration::from_secs(10);

/// Everything that makes a node.
#[derive(Clone)]
pub(crate) struct Node {
    pub(crate) name: String,
    pub(crate) addresses: PerFamily<IpAddr>,
    pub(crate) cluster: Cluster,
    pub(crate) paths: Paths,
    pub(crate) programs: Programs,
    /// The kubelet's serving certificate.
    pub(crate) serving: Identity,
    pub(crate) authority: String,
    pub(crate) ways: Ways,
}

impl Node {
    /// The node's end of the tunnels to the others. IPv4 wherever there is one: its header is 20 bytes shorter.
    pub(crate) fn tunnel(&self) -> IpAddr {
        self.addresses.family(false).unwrap_or(self.addresses.primary)
    }
}

/// One identity for each part of a node.
pub(crate) struct Clients {
    pub(crate) kubelet: kube::Client,
    pub(crate) proxy: kube::Client,
    pub(crate) dns: kube::Client,
}

impl Clients {
    /// Clients that call the API server of this process directly.
    pub(crate) fn in_process(server: &weft_control_apiserver::Server, node: &str) -> Self {
        let authenticated = "system:authenticated";
        Self {
            kubelet: server.client(&format!("system:node:{node}"), &[NODES, authenticated]),
            proxy: server.client(PROXY.0, &[PROXY.1, authenticated]),
            dns: server.client(DNS.0, &["system:serviceaccounts", DNS.1, authenticated]),
        }
    }

    /// Clients over HTTPS, by the kubeconfigs that [`enroll`] wrote.
    async fn from_files(folder: &std::path::Path) -> anyhow::Result<Self> {
        let client = async |name: &str| -> anyhow::Result<kube::Client> {
            let path = folder.join(format!("{name}.kubeconfig"));
            let file = kube::config::Kubeconfig::read_from(&path)
                .with_context(|| format!("cannot use {}", path.display()))?;
            let options = kube::config::KubeConfigOptions::default();
            let config = kube::Config::from_custom_kubeconfig(file, &options).await?;
            Ok(kube::Client::try_from(config)?)
        };
        Ok(Self {
            kubelet: client("kubelet").await?,
            proxy: client("proxy").await?,
            dns: client("dns").await?,
        })
    }
}

/// Makes a node's keys, certificates and kubeconfigs in its own folder: all that an agent in another process needs.
pub(crate) fn enroll(
    authority: &Authority,
    folder: &std::path::Path,
    node: &str,
    addresses: PerFamily<IpAddr>,
    server: &str,
) -> anyhow::Result<()> {
    let user = format!("system:node:{node}");
    let identities: [(&str, Subject<'_>); 3] = [
        ("kubelet", Subject::client(&user, &[NODES])),
        ("proxy", Subject::client(PROXY.0, &[PROXY.1])),
        ("dns", Subject::client(DNS.0, &[])),
    ];
    for (name, subject) in identities {
        let identity = authority.identity_in(folder, name, &subject)?;
        let text = kubeconfig::render(server, authority.certificate(), subject.name, &identity);
        pki::write(&folder.join(format!("{name}.kubeconfig")), &text, 0o600)?;
    }
    serving(authority, folder, node, addresses)?;
    pki::write(&folder.join("ca.crt"), authority.certificate(), 0o644)?;
    Ok(())
}

/// The kubelet's serving certificate.
pub(crate) fn serving(
    authority: &Authority,
    folder: &std::path::Path,
    node: &str,
    addresses: PerFamily<IpAddr>,
) -> Result<Identity, pki::Error> {
    let user = format!("system:node:{node}");
    let subject = Subject {
        name: &user,
        groups: &[NODES],
        dns: vec![node.to_owned()],
        addresses: addresses.iter().collect(),
    };
    authority.identity_in(folder, "serving", &subject)
}

/// `weft agent`: one node in a process of its own.
pub(crate) fn command(paths: &Paths, args: &AgentArgs, log: &str) -> anyhow::Result<()> {
    if let Some(folder) = &args.enter {
        // Before any thread exists: only a single-threaded process may enter a mount namespace.
        nodes::enter(folder)?;
    }
    logging::start(log)?;
    let node = from_disk(paths, args)?;
    let node_paths = paths.node(&node.name);
    if args.purge || args.stop {
        return crate::up::runtime()?.block_on(remove(&node, args.purge));
    }
    let _claim = lock::claim(&node_paths.lock())?.map_err(|pid| match pid {
        Some(pid) => anyhow::anyhow!("the agent of {} already runs, as process {pid}", node.name),
        None => anyhow::anyhow!("the agent of {} already runs", node.name),
    })?;
    crate::up::runtime()?.block_on(async {
        let shutdown = crate::up::shutdown_on_signal()?;
        let clients = Clients::from_files(&node_paths.pki()).await?;
        run(node, clients, shutdown).await
    })
}

fn from_disk(paths: &Paths, args: &AgentArgs) -> anyhow::Result<Node> {
    let cluster =
        Cluster::read(&paths.cluster_file())?.context("there is no cluster in this data directory")?;
    let families = |v6| (cluster.cluster_cidr.family(v6).is_some(), args.node_ip.family(v6).is_some());
    anyhow::ensure!(
        [false, true].into_iter().all(|v6| matches!(families(v6), (true, true) | (false, false))),
        "the node's address is {}, and pods are in {}: it must have one of each of their families, and no other",
        args.node_ip,
        cluster.cluster_cidr
    );
    let folder = paths.node(&args.node).pki();
    let removal = args.purge || args.stop;
    let read = |name: &str| {
        let path = folder.join(name);
        match std::fs::read_to_string(&path) {
            // A node is removed without its keys: it may have got none.
            Err(_) if removal => Ok(String::new()),
            outcome => outcome.with_context(|| format!("cannot read {}", path.display())),
        }
    };
    Ok(Node {
        name: args.node.clone(),
        addresses: args.node_ip,
        cluster,
        paths: paths.clone(),
        programs: artifacts::unpack(&paths.bin())?,
        serving: Identity { certificate: read("serving.crt")?, key: read("serving.key")? },
        authority: read("ca.crt")?,
        ways: args.ways.clone(),
    })
}

/// Runs the node until `shutdown`; its containers go on.
pub(crate) async fn run(node: Node, clients: Clients, shutdown: CancellationToken) -> anyhow::Result<()> {
    let paths = node.paths.node(&node.name);
    network::prepare_node(&node, &paths)?;
    let runtime: Arc<dyn Runtime> = Arc::new(
        BuiltinRuntime::open(runtime_config(&node)).await.context("cannot start the container runtime")?,
    );
    let (network_ready, is_ready) = watch::channel(false);
    let (programmed, is_programmed) = watch::channel(false);

    let mut tasks: JoinSet<anyhow::Result<()>> = JoinSet::new();
    let (reports, to_report) = watch::channel(dataplane::report::Report::default());
    let mut config = dataplane_config(&node, &paths);
    config.reports = Some(reports);
    let (gate, stop) = (config.gate.clone(), shutdown.clone());
    tasks.spawn(async move {
        dataplane::run(config, clients.proxy, programmed, stop).await.context("the data plane failed")
    });
    let keeping =
        dataplane::report::keep(clients.kubelet.clone(), node.name.clone(), to_report, shutdown.clone());
    let stop = shutdown.clone();
    tasks.spawn(async move {
        keeping.await;
        stop.cancelled().await;
        Ok(())
    });
    let (path, observer) = (paths.control_socket(), Arc::new(observer(&node, &paths)));
    let stop = shutdown.clone();
    tasks.spawn(async move {
        if let Err(error) = dataplane::observe::socket::serve(path, observer, stop.clone()).await {
            tracing::warn!(
                error = weft_agent_runtime::chain(&error),
                "the node answers no questions; it runs all the same"
            );
            stop.cancelled().await;
        }
        Ok(())
    });
    let (task, stop) = (network::Task::new(&node, &paths, clients.kubelet.clone()), shutdown.clone());
    tasks.spawn(async move {
        stop.run_until_cancelled(task.run(is_programmed, network_ready)).await.unwrap_or(Ok(()))
    });
    let (mut config, stop) = (kubelet_config(&node, &paths, is_ready), shutdown.clone());
    config.pod_gate = gate.map(|gate| {
        kubelet::PodGate::new(move |pod, addresses| {
            let gate = gate.clone();
            async move { gate.wait(pod, addresses).await.map_err(|error| error.to_string()) }
        })
    });
    tasks.spawn(async move {
        kubelet::run(config, clients.kubelet, runtime, stop).await.context("the kubelet failed")
    });
    let (config, stop) = (dns_config(&node), shutdown.clone());
    tasks.spawn(async move { dns::run(config, clients.dns, stop).await.context("the cluster DNS failed") });
    crate::up::until_done(tasks, &shutdown).await
}

fn runtime_config(node: &Node) -> builtin::Config {
    let mut config = builtin::Config::new(&node.name, &node.paths.data, &node.paths.run);
    config.init_path = node.programs.init.clone();
    config.cgroup_parent = node.paths.node_cgroup(&node.name);
    config.cni_bin_dirs = vec![node.programs.cni_bin.clone(), PathBuf::from("/opt/cni/bin")];
    config.cni_conf_dir = node.paths.node(&node.name).cni_conf();
    config
}

fn dataplane_config(node: &Node, paths: &NodePaths) -> dataplane::Config {
    dataplane::Config {
        node_name: node.name.clone(),
        node_ip: node.tunnel(),
        cluster_cidr: node.cluster.cluster_cidr.iter().collect(),
        service_cidr: node.cluster.service_cidr.iter().collect(),
        node_local: node.cluster.dns_ips().iter().collect(),
        pin_dir: paths.bpffs(),
        node_cgroup: node.paths.node_cgroup(&node.name),
        ebpf_object: node.programs.ebpf,
        gate: Some(dataplane::policy::Gate::default()),
        proxy: dataplane::ProxyConfig { xdp: node.ways.xdp, ..dataplane::ProxyConfig::default() },
        balancer_pools: node.cluster.load_balancer_pools.clone(),
        pod_network: dataplane::PodNetwork::Own,
        routing: node.ways.routing,
        direct_return: node.ways.direct_return,
        reports: None,
    }
}

/// What the agent tells of itself: it is in the node's namespaces already.
fn observer(node: &Node, paths: &NodePaths) -> dataplane::observe::Observer {
    dataplane::observe::Observer {
        pins: paths.bpffs(),
        netns: None,
        cgroup: node.paths.node_cgroup(&node.name),
    }
}

fn kubelet_config(node: &Node, paths: &NodePaths, ready: watch::Receiver<bool>) -> kubelet::Config {
    let tls = kubelet::ServerTls {
        cert_pem: node.serving.certificate.clone(),
        key_pem: node.serving.key.clone(),
        client_ca_pem: node.authority.clone(),
    };
    let address = node.addresses.primary;
    let mut config = kubelet::Config::new(&node.name, address, &node.paths.data, tls, ready);
    config.run_dir = node.paths.run.clone();
    config.pod_log_dir = paths.logs();
    config.secondary_node_ip = node.addresses.secondary;
    config.cluster_dns = node.cluster.dns_ips().primary;
    config.cluster_domain = DOMAIN.to_owned();
    config.listen = SocketAddr::new(address, KUBELET_PORT);
    let version = node.ways.direct_return.then(|| DIRECT_RETURN_VERSION.to_owned());
    config.annotations.insert(DIRECT_RETURN.to_owned(), version);
    config
}

fn dns_config(node: &Node) -> dns::Config {
    let own: Vec<IpAddr> = node.cluster.dns_ips().iter().collect();
    let resolv_conf = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    dns::Config {
        listen: own.iter().map(|address| SocketAddr::new(*address, 53)).collect(),
        domain: DOMAIN.to_owned(),
        upstreams: dns::upstreams(&resolv_conf, &own),
    }
}

/// Ends the node's pods; with `purge` removes everything it made. Errors are collected: one part that can't be removed
/// doesn't keep the others.
pub(crate) async fn remove(node: &Node, purge: bool) -> anyhow::Result<()> {
    if !purge {
        return stop_pods(node).await;
    }
    let paths = node.paths.node(&node.name);
    let mut failed = Vec::new();
    if let Err(error) = builtin::purge(runtime_config(node)).await {
        failed.push(weft_agent_runtime::chain(&error));
    }
    if let Err(error) = kubelet::purge(&node.paths.data, &node.paths.run, &node.name) {
        failed.push(weft_agent_runtime::chain(&error));
    }
    if let Err(error) = dataplane::cleanup(&dataplane_config(node, &paths)).await {
        failed.push(weft_agent_runtime::chain(&error));
    }
    failed.extend(network::remove_node(node, &paths));
    anyhow::ensure!(failed.is_empty(), "cannot remove all of node {}: {}", node.name, failed.join("; "));
    Ok(())
}

async fn stop_pods(node: &Node) -> anyhow::Result<()> {
    let runtime = BuiltinRuntime::open(runtime_config(node)).await?;
    let containers = runtime.list_containers().await?;
    let stops = containers.iter().map(|container| runtime.stop_container(&container.id, STOP_GRACE));
    let stopped = futures::future::join_all(stops).await;
    for sandbox in runtime.list_sandboxes().await? {
        runtime.stop_sandbox(&sandbox.id).await?;
    }
    stopped.into_iter().collect::<Result<Vec<()>, _>>()?;
    Ok(())
}
