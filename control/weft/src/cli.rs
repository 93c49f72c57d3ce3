//! The command line: names and flags.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use ipnetwork::IpNetwork;

use crate::net::args::{DoctorArgs, FlowsArgs, NetCommand, PolicyCommand, ServiceCommand, WhyArgs};
use crate::paths::DEFAULT_DATA_DIR;
use crate::proxy::ProxyArgs;
use crate::ranges::PerFamily;
use crate::ways::Ways;

/// Kubernetes in one binary, built network-first.
#[derive(Debug, Parser)]
#[command(name = "weft", version = crate::VERSION, disable_help_subcommand = true)]
pub(crate) struct Cli {
    /// Where the cluster's data lies
    #[arg(long, global = true, default_value = DEFAULT_DATA_DIR, value_name = "DIR")]
    pub(crate) data_dir: PathBuf,
    /// What to log: error, warn, info, debug, or a filter such as weft_agent_kubelet=debug
    #[arg(long, global = true, default_value = "info", value_name = "FILTER", env = "WEFT_LOG")]
    pub(crate) log: String,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a cluster on this machine; on an existing data directory, resume it
    Up(UpArgs),
    /// Stop the cluster of this data directory; its data stays
    Down(DownArgs),
    /// Run the control plane alone
    Server(ServerArgs),
    /// Run one node
    Agent(AgentArgs),
    /// Run the service proxy alone, on a node of any cluster, in place of kube-proxy
    Proxy(ProxyArgs),
    /// Import, list and remove images, on every node of the cluster
    #[command(subcommand)]
    Image(ImageCommand),
    /// Say step by step what becomes of a connection, and which object in the API makes it so
    Why(WhyArgs),
    /// Watch connections get their backends, and what is refused or dropped, as it happens
    Flows(FlowsArgs),
    /// Propose NetworkPolicies
    #[command(subcommand)]
    Policy(PolicyCommand),
    /// Try the network of the running cluster
    #[command(subcommand)]
    Net(NetCommand),
    /// Look through what the cluster stands on, and say what to do about what is wrong
    Doctor(DoctorArgs),
    /// See which Services the kernels of the nodes carry
    #[command(subcommand, visible_alias = "svc")]
    Service(ServiceCommand),
    /// Print the administrator's kubeconfig
    Kubeconfig,
    /// Print the version
    Version,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct UpArgs {
    /// Return when the nodes are Ready, and go on in the background
    #[arg(long)]
    pub(crate) detach: bool,
    /// How many nodes the cluster has; more than one get network namespaces of their own
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=64))]
    pub(crate) nodes: Option<u8>,
    #[command(flatten)]
    pub(crate) ways: Ways,
    #[command(flatten)]
    pub(crate) server: ServerArgs,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct ServerArgs {
    /// Address and port that the API listens on [default: port 6443 of all addresses of the primary family]
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub(crate) listen: Option<SocketAddr>,
    /// Addresses of the pods: a range, or one of IPv4 and one of IPv6, the primary family first [default: 10.42.0.0/16]
    #[arg(long, value_name = "CIDR[,CIDR]")]
    pub(crate) cluster_cidr: Option<PerFamily<IpNetwork>>,
    /// Addresses of the Services, in the same way [default: 10.43.0.0/16]
    #[arg(long, value_name = "CIDR[,CIDR]")]
    pub(crate) service_cidr: Option<PerFamily<IpNetwork>>,
    /// Addresses for Services of type LoadBalancer; without any, somebody else gives them
    #[arg(long, value_name = "CIDR[,CIDR...]", value_delimiter = ',')]
    pub(crate) load_balancer_pool: Option<Vec<IpNetwork>>,
    /// Keep the cluster's state in etcd instead of in the data directory: etcd=https://a:2379,https://b:2379
    #[arg(long, value_name = "etcd=URL,...", value_parser = parse_store)]
    pub(crate) store: Option<EtcdUrls>,
    /// Certificate authority of etcd, PEM
    #[arg(long, value_name = "FILE", requires = "store")]
    pub(crate) etcd_cafile: Option<PathBuf>,
    /// Certificate to show to etcd, PEM
    #[arg(long, value_name = "FILE", requires = "etcd_keyfile")]
    pub(crate) etcd_certfile: Option<PathBuf>,
    /// Key of that certificate, PEM
    #[arg(long, value_name = "FILE", requires = "etcd_certfile")]
    pub(crate) etcd_keyfile: Option<PathBuf>,
    /// How long a node may be silent before it counts as gone
    #[arg(long, default_value = "40", value_name = "SECONDS")]
    pub(crate) node_monitor_grace_period: u64,
}

#[derive(Debug, Args)]
pub(crate) struct DownArgs {
    /// Also remove the containers, the network and all data
    #[arg(long)]
    pub(crate) purge: bool,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct AgentArgs {
    /// The node's name
    #[arg(long, value_name = "NAME")]
    pub(crate) node: String,
    /// The node's address, or one of IPv4 and one of IPv6, the primary family first
    #[arg(long, value_name = "ADDRESS[,ADDRESS]")]
    pub(crate) node_ip: PerFamily<IpAddr>,
    /// Folder with the files ns/net, ns/mnt and ns/uts of the namespaces to enter first
    #[arg(long, value_name = "DIR")]
    pub(crate) enter: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) ways: Ways,
    /// Stop the node's pods instead of running it
    #[arg(long, hide = true)]
    pub(crate) stop: bool,
    /// Remove everything of the node instead of running it
    #[arg(long, hide = true, conflicts_with = "stop")]
    pub(crate) purge: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ImageCommand {
    /// Import images from an OCI archive, an OCI layout or a `docker save` file
    Import {
        /// The file or folder
        archive: PathBuf,
    },
    /// List the images
    Ls,
    /// Remove an image
    Rm {
        /// Its reference or id
        image: String,
    },
}

/// Where etcd answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct EtcdUrls(pub(crate) Vec<String>);

fn parse_store(text: &str) -> Result<EtcdUrls, String> {
    let urls = text.strip_prefix("etcd=").ok_or("expected etcd=URL,URL,...")?;
    let urls: Vec<String> =
        urls.split(',').map(str::trim).filter(|url| !url.is_empty()).map(str::to_owned).collect();
    let is_url = |url: &String| url.starts_with("http://") || url.starts_with("https://");
    match urls.iter().find(|url| !is_url(url)) {
        Some(wrong) => Err(format!("{wrong:?} is no http or https URL")),
        None if urls.is_empty() => Err("no URL given".to_owned()),
        None => Ok(EtcdUrls(urls)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_store_flag_takes_urls_only() {
        assert_eq!(parse_store("etcd=https://a:2379,https://b:2379").unwrap().0.len(), 2);
        assert!(parse_store("etcd=").is_err());
        assert!(parse_store("etcd=a:2379").is_err());
        assert!(parse_store("sqlite=x").is_err());
    }

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory as _;
        Cli::command().debug_assert();
    }
}
