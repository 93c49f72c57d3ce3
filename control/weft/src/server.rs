//! The control plane's role: store, API server, controllers and scheduler in one process.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use ipnetwork::IpNetwork;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use weft_control_apiserver as apiserver;
use weft_control_controllers as controllers;
use weft_control_scheduler as scheduler;
use weft_control_store::Store;
use weft_control_store::embedded::{self, EmbeddedStore};
use weft_control_store::etcd::{EtcdStore, TlsOptions};

use crate::cli::ServerArgs;
use crate::cluster::{Cluster, DOMAIN, Wanted};
use crate::paths::Paths;
use crate::pki::{self, Authority, Identity, Subject};
use crate::{kubeconfig, lock, logging, network};

/// Common name by which kubelets know the API server.
const KUBELET_CLIENT: &str = "kube-apiserver-kubelet-client";
const MASTERS: &str = "system:masters";
/// Where the API listens unless told otherwise.
const API_PORT: u16 = 6443;

/// A control plane that serves.
pub(crate) struct Running {
    pub(crate) server: Arc<apiserver::Server>,
    pub(crate) authority: Arc<Authority>,
    pub(crate) port: u16,
    /// Ends when any part fails, or after shutdown when all have stopped.
    pub(crate) tasks: JoinSet<anyhow::Result<()>>,
}

/// `weft server`: the control plane alone, until SIGTERM or SIGINT.
pub(crate) fn command(paths: &Paths, args: &ServerArgs, log: &str) -> anyhow::Result<()> {
    logging::start(log)?;
    let wanted = args.wanted(None);
    let listener = listen(args, &Cluster::plan(&paths.cluster_file(), &wanted, &network::hostname())?)?;
    let _claim = claim(paths)?;
    let cluster = Cluster::open(&paths.cluster_file(), &wanted, &network::hostname())?;
    let advertise = network::machine_addresses(&cluster)?.addresses.primary;
    crate::up::runtime()?.block_on(async {
        let shutdown = crate::up::shutdown_on_signal()?;
        let plane = Plane { paths, cluster: &cluster, args };
        let running = plane.start(listener, advertise, shutdown.clone()).await?;
        tracing::info!(port = running.port, "the control plane is up");
        crate::up::until_done(running.tasks, &shutdown).await
    })
}

/// Takes the control plane's role, or says who has it.
pub(crate) fn claim(paths: &Paths) -> anyhow::Result<lock::Claim> {
    match lock::claim(&paths.server_lock()).context("cannot lock the run-time directory")? {
        Ok(claim) => Ok(claim),
        Err(Some(pid)) => anyhow::bail!("weft already runs with this data directory, as process {pid}"),
        Err(None) => anyhow::bail!("weft already runs with this data directory"),
    }
}

impl ServerArgs {
    /// What is asked for of the cluster.
    pub(crate) fn wanted(&self, nodes: Option<u8>) -> Wanted {
        Wanted {
            nodes,
            cluster_cidr: self.cluster_cidr,
            service_cidr: self.service_cidr,
            load_balancer_pools: self.load_balancer_pool.clone(),
        }
    }
}

/// Takes the API's port.
pub(crate) fn listen(args: &ServerArgs, cluster: &Cluster) -> anyhow::Result<std::net::TcpListener> {
    let any: IpAddr = match cluster.cluster_cidr.primary {
        IpNetwork::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        // Takes connections over IPv4 too.
        IpNetwork::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let address = args.listen.unwrap_or(SocketAddr::new(any, API_PORT));
    anyhow::ensure!(
        any.is_ipv4() || address.is_ipv6(),
        "the nodes reach the API over IPv6, their primary family, and {address} is of IPv4"
    );
    let listener = std::net::TcpListener::bind(address)
        .with_context(|| format!("cannot listen at {address} for the API"))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// What a control plane is started with.
pub(crate) struct Plane<'a> {
    pub(crate) paths: &'a Paths,
    pub(crate) cluster: &'a Cluster,
    pub(crate) args: &'a ServerArgs,
}

impl Plane<'_> {
    /// Starts every part; answers once the API serves.
    pub(crate) async fn start(
        &self,
        listener: std::net::TcpListener,
        advertise: IpAddr,
        shutdown: CancellationToken,
    ) -> anyhow::Result<Running> {
        let listener = TcpListener::from_std(listener)?;
        let port = listener.local_addr()?.port();
        let authority = Arc::new(Authority::open(&self.paths.pki())?);
        let config = api_config(self.paths, self.cluster, &authority, SocketAddr::new(advertise, port))?;
        write_admin_kubeconfig(self.paths, &authority, port)?;
        let store = open_store(self.paths, self.args).await?;
        let server = apiserver::Server::start(config, store).await.context("cannot start the API server")?;
        let server = Arc::new(server);

        let mut tasks = JoinSet::new();
        let serving = server.clone();
        let stop = shutdown.clone();
        tasks.spawn(async move { serving.serve(listener, stop).await.context("the API server failed") });
        spawn_controllers(&mut tasks, self.cluster, self.args, &authority, &server, &shutdown);
        let client = server.client("system:kube-scheduler", &["system:authenticated"]);
        let stop = shutdown.clone();
        tasks.spawn(async move {
            scheduler::run(scheduler::Config::default(), client, stop).await.context("the scheduler failed")
        });
        Ok(Running { server, authority, port, tasks })
    }
}

fn spawn_controllers(
    tasks: &mut JoinSet<anyhow::Result<()>>,
    cluster: &Cluster,
    args: &ServerArgs,
    authority: &Authority,
    server: &Arc<apiserver::Server>,
    shutdown: &CancellationToken,
) {
    let config = controllers::Config {
        cluster_cidrs: cluster.cluster_cidr.iter().collect(),
        service_cidrs: cluster.service_cidr.iter().collect(),
        load_balancer_pools: cluster.load_balancer_pools.clone(),
        root_ca_pem: authority.certificate().to_owned(),
        identity: network::hostname(),
        leader_election: true,
        node_monitor_grace: Duration::from_secs(args.node_monitor_grace_period),
    };
    let server = server.clone();
    let clients = move |name: &str| {
        if name == controllers::MANAGER {
            return server.client("system:kube-controller-manager", &["system:authenticated"]);
        }
        let user = format!("system:serviceaccount:kube-system:{name}");
        let groups = ["system:serviceaccounts", "system:serviceaccounts:kube-system", "system:authenticated"];
        server.client(&user, &groups)
    };
    let stop = shutdown.clone();
    tasks.spawn(
        async move { controllers::run(config, clients, stop).await.context("the controllers failed") },
    );
}

async fn open_store(paths: &Paths, args: &ServerArgs) -> anyhow::Result<Arc<dyn Store>> {
    let Some(urls) = &args.store else {
        let path = paths.store();
        let open = move || EmbeddedStore::open(path, embedded::Options::default());
        let store = tokio::task::spawn_blocking(open).await?.context("cannot open the embedded store")?;
        return Ok(Arc::new(store));
    };
    let read = |path: &std::path::PathBuf| {
        std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))
    };
    let tls = match &args.etcd_cafile {
        Some(ca) => {
            let client = match (&args.etcd_certfile, &args.etcd_keyfile) {
                (Some(certificate), Some(key)) => Some((read(certificate)?, read(key)?)),
                _ => None,
            };
            Some(TlsOptions { ca: read(ca)?, client, server_name: None })
        }
        None => None,
    };
    let store = EtcdStore::connect(&urls.0, tls, "").await.context("cannot use etcd")?;
    Ok(Arc::new(store))
}

fn api_config(
    paths: &Paths,
    cluster: &Cluster,
    authority: &Authority,
    advertise: SocketAddr,
) -> anyhow::Result<apiserver::Config> {
    let names = ["localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc"];
    let mut dns: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    dns.push(format!("kubernetes.default.svc.{DOMAIN}"));
    dns.push(network::hostname());
    let mut addresses = vec![IpAddr::from([127, 0, 0, 1]), cluster.api_service_ip(), advertise.ip()];
    addresses.extend(cluster.underlay_gateway().iter());
    let serving = Subject { name: "kube-apiserver", groups: &[], dns, addresses };
    let pem = |identity: Identity| apiserver::CertifiedKeyPem {
        certificates: identity.certificate,
        key: identity.key,
    };
    let kubelet =
        authority.identity("apiserver-kubelet-client", &Subject::client(KUBELET_CLIENT, &[MASTERS]))?;
    Ok(apiserver::Config {
        advertise_address: advertise.ip(),
        advertise_port: advertise.port(),
        serving: pem(authority.identity("apiserver", &serving)?),
        client_ca: authority.certificate().to_owned(),
        service_accounts: apiserver::ServiceAccountKeys {
            signing_key: pki::service_account_key(&paths.pki())?,
            verification_keys: Vec::new(),
            issuer: format!("https://kubernetes.default.svc.{DOMAIN}"),
            audiences: Vec::new(),
        },
        service_cidrs: cluster
            .service_cidr
            .iter()
            .map(|range| range.to_string().parse())
            .collect::<Result<_, _>>()?,
        node_port_range: 30000..=32767,
        kubelet_client: Some(apiserver::KubeletClient {
            identity: pem(kubelet),
            ca: authority.certificate().to_owned(),
        }),
        cluster_domain: DOMAIN.to_owned(),
        max_request_bytes: apiserver::DEFAULT_MAX_REQUEST_BYTES,
        event_ttl: Duration::from_secs(3600),
        compaction_interval: Duration::from_secs(300),
    })
}

fn write_admin_kubeconfig(paths: &Paths, authority: &Authority, port: u16) -> anyhow::Result<()> {
    let identity = authority.identity("admin", &Subject::client("kubernetes-admin", &[MASTERS]))?;
    let server = format!("https://127.0.0.1:{port}");
    let text = kubeconfig::render(&server, authority.certificate(), "kubernetes-admin", &identity);
    let path = paths.admin_kubeconfig();
    // Unchanged stays untouched, so that a reader never meets a half-written file for nothing.
    if std::fs::read_to_string(&path).is_ok_and(|present| present == text) {
        return Ok(());
    }
    Ok(pki::write(&path, &text, 0o600)?)
}
