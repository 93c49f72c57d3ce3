//! `weft proxy`: the service proxy alone, on a node of any Kubernetes cluster, in place of kube-proxy.

mod kube_proxy;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Args;
use ipnetwork::IpNetwork;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use weft_agent_dataplane::overlay::Routing;
use weft_agent_dataplane::xdp::Xdp;
use weft_agent_dataplane::{self as dataplane, PodNetwork, ProxyConfig};

use crate::{artifacts, lock, logging, network};

/// Names of flags are kube-proxy's where it has them.
#[derive(Clone, Debug, Args)]
pub(crate) struct ProxyArgs {
    /// Kubeconfig of an identity that may what system:node-proxier may; without it, the pod's service account
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// The node's name in the cluster [default: the host's name]
    #[arg(long, value_name = "NAME", env = "NODE_NAME")]
    hostname_override: Option<String>,
    /// Only the node's addresses in these ranges answer NodePorts
    #[arg(long, value_name = "CIDR[,CIDR...]", value_delimiter = ',')]
    nodeport_addresses: Vec<IpNetwork>,
    /// The bridge that the pods of this node are ports of: packets from it are the cluster's own
    #[arg(long, value_name = "NAME")]
    pod_bridge_interface: Option<String>,
    /// Where /healthz and /livez are served
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "0.0.0.0:10256")]
    healthz_bind_address: SocketAddr,
    /// Where /metrics is served
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:10249")]
    metrics_bind_address: SocketAddr,
    /// Where XDP carries packets from outside to this node's pods, if the driver can: auto (all uplinks but veth pairs), always, never
    #[arg(long, value_name = "MODE", default_value = "auto")]
    xdp: Xdp,
    /// Serve only processes below this cgroup, for a node that is itself a container [default: all]
    #[arg(long, value_name = "PATH")]
    cgroup: Option<PathBuf>,
    /// Where programs and maps are pinned; Services go on for as long as they are
    #[arg(long, value_name = "DIR", default_value = "/run/weft-proxy/bpf")]
    pin_dir: PathBuf,
    /// Once all Services are served, remove kube-proxy's rules of iptables and nftables
    #[arg(long)]
    cleanup_kube_proxy: bool,
    /// Remove what an earlier run left, programs and maps, and exit
    #[arg(long)]
    cleanup: bool,
}

pub(crate) fn command(args: &ProxyArgs, log: &str) -> anyhow::Result<()> {
    logging::start(log)?;
    let runtime = crate::up::single_runtime()?;
    let config = config(args)?;
    let _claim = lock::claim(&lock_file(&args.pin_dir))?
        .map_err(|pid| anyhow::anyhow!("a proxy already runs with these pins, as process {pid:?}"))?;
    if args.cleanup {
        runtime.block_on(dataplane::cleanup(&config))?;
        kube_proxy::remove_replacement()?;
        return remove_folder(&args.pin_dir);
    }
    runtime.block_on(async {
        let shutdown = crate::up::shutdown_on_signal()?;
        let client = client(args.kubeconfig.as_deref()).await?;
        run(config, client, args.cleanup_kube_proxy, shutdown).await
    })
}

/// The pins' file system, if it was mounted for them, and its folder.
fn remove_folder(pins: &Path) -> anyhow::Result<()> {
    network::unmount(pins)?;
    for removed in [std::fs::remove_dir(pins), std::fs::remove_file(lock_file(pins))] {
        match removed {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("cannot remove {}", pins.display()));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Beside the pins: they are on a file system of their own.
fn lock_file(pins: &Path) -> PathBuf {
    pins.with_extension("pid")
}

fn config(args: &ProxyArgs) -> anyhow::Result<dataplane::Config> {
    Ok(dataplane::Config {
        node_name: args.hostname_override.clone().unwrap_or_else(network::hostname).to_lowercase(),
        node_ip: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        cluster_cidr: Vec::new(),
        service_cidr: Vec::new(),
        node_local: Vec::new(),
        pin_dir: args.pin_dir.clone(),
        node_cgroup: relative(args.cgroup.as_deref()),
        ebpf_object: artifacts::ebpf()?,
        gate: None,
        proxy: ProxyConfig {
            node_port_addresses: args.nodeport_addresses.clone(),
            health: Some(args.healthz_bind_address),
            metrics: Some(args.metrics_bind_address),
            xdp: args.xdp,
        },
        balancer_pools: Vec::new(),
        routing: Routing::Tunnel,
        direct_return: false,
        pod_network: PodNetwork::Others { bridge: args.pod_bridge_interface.clone() },
        // A proxy alone has no Lease to write to.
        reports: None,
    })
}

/// A cgroup below cgroup2's root; with or without the leading slash.
fn relative(cgroup: Option<&Path>) -> PathBuf {
    let cgroup = cgroup.unwrap_or(Path::new(""));
    cgroup.strip_prefix("/").unwrap_or(cgroup).to_owned()
}

async fn client(kubeconfig: Option<&Path>) -> anyhow::Result<kube::Client> {
    let config = match kubeconfig {
        Some(path) => {
            let file = kube::config::Kubeconfig::read_from(path)
                .with_context(|| format!("cannot use {}", path.display()))?;
            kube::Config::from_custom_kubeconfig(file, &kube::config::KubeConfigOptions::default()).await?
        }
        None => kube::Config::incluster().context("not in a pod of a cluster, and no --kubeconfig")?,
    };
    Ok(kube::Client::try_from(config)?)
}

async fn run(
    config: dataplane::Config,
    client: kube::Client,
    take_over: bool,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let (programmed, mut is_programmed) = watch::channel(false);
    let proxy = dataplane::run(config, client, programmed, shutdown.clone());
    let after = async {
        // An error is the end of the proxy, which says why itself.
        if is_programmed.wait_for(|is| *is).await.is_ok() {
            tracing::info!("all Services are served");
            if take_over {
                remove_rules().await;
            }
        }
        shutdown.cancelled().await;
    };
    tokio::select! {
        outcome = proxy => outcome.context("the service proxy failed"),
        () = after => Ok(()),
    }
}

/// Services are served with or without the old rules: what can't be removed is told, and no reason to stop.
async fn remove_rules() {
    match tokio::task::spawn_blocking(kube_proxy::remove).await {
        Ok(Ok(removed)) if removed.is_empty() => tracing::info!("kube-proxy left no rules"),
        Ok(Ok(removed)) => tracing::info!(removed = removed.join(", "), "removed kube-proxy's rules"),
        Ok(Err(error)) => tracing::warn!(error = format!("{error:#}"), "cannot remove kube-proxy's rules"),
        Err(error) => tracing::warn!(%error, "removing kube-proxy's rules broke down"),
    }
}
