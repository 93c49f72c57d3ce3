//! `weft up`: a whole cluster on this machine.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use futures::{StreamExt as _, TryStreamExt as _};
use k8s_openapi::api::core::v1 as core;
use kube::ResourceExt as _;
use kube::runtime::{WatchStreamExt as _, watcher};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::agent::{self, Clients, Node};
use crate::artifacts;
use crate::cli::UpArgs;
use crate::cluster::Cluster;
use crate::paths::Paths;
use crate::ranges::PerFamily;
use crate::{lock, logging, network, nodes, server};

/// Names the descriptor on which a detached child says that it is ready.
const READY_FD: &str = "WEFT_READY_FD";
/// How long parts may take to stop before the process ends without them.
const STOP_PATIENCE: Duration = Duration::from_secs(10);

/// Runs the command.
pub(crate) fn up(paths: &Paths, args: &UpArgs, log: &str) -> anyhow::Result<()> {
    check_machine()?;
    if args.detach {
        return detach(paths, args);
    }
    let begin = Instant::now();
    // All that can be wrong is found before anything is made.
    let listener = preflight(paths, args)?;
    let _claim = server::claim(paths)?;
    let ready = ready_pipe();
    let cluster =
        Cluster::open(&paths.cluster_file(), &args.server.wanted(args.nodes), &network::hostname())?;
    logging::start(log)?;
    let programs = artifacts::unpack(&paths.bin())?;
    runtime()?.block_on(async {
        let shutdown = shutdown_on_signal()?;
        let mut running = Up { paths, args, cluster: &cluster, shutdown: shutdown.clone() }
            .start(listener, programs)
            .await?;
        let server = running.server.clone();
        let admin = server.client("system:weft-up", &["system:masters", "system:authenticated"]);
        tokio::select! {
            outcome = nodes_ready(admin, &cluster.nodes) => outcome?,
            () = shutdown.cancelled() => {}
            ended = running.tasks.join_next() => ended.context("nothing runs")???,
        }
        announce(paths, &cluster, running.port, begin.elapsed(), ready);
        until_done(running.tasks, &shutdown).await
    })
}

/// What `weft up` was asked for.
struct Up<'a> {
    paths: &'a Paths,
    args: &'a UpArgs,
    cluster: &'a Cluster,
    shutdown: CancellationToken,
}

impl Up<'_> {
    /// Starts the control plane and the nodes.
    async fn start(
        &self,
        listener: std::net::TcpListener,
        programs: artifacts::Programs,
    ) -> anyhow::Result<server::Running> {
        let alone = self.cluster.nodes.len() == 1;
        let machine = network::machine_addresses(self.cluster)?;
        let here = if alone { machine.addresses } else { self.cluster.underlay_gateway() };
        if machine.on_underlay || !alone {
            network::ensure_underlay(self.cluster)?;
        }
        let plane = server::Plane { paths: self.paths, cluster: self.cluster, args: &self.args.server };
        let mut running = plane.start(listener, here.primary, self.shutdown.clone()).await?;
        if let [name] = self.cluster.nodes.as_slice() {
            let node = self.node_here(&running, name, here, programs)?;
            let clients = Clients::in_process(&running.server, name);
            let stop = self.shutdown.clone();
            running.tasks.spawn(agent::run(node, clients, stop));
            return Ok(running);
        }
        let client = running.server.client("system:weft-up", &["system:masters", "system:authenticated"]);
        running.tasks.spawn(crate::pod_routes::keep(client, self.shutdown.clone()));
        for (index, name) in self.cluster.nodes.iter().enumerate() {
            let addresses = self.cluster.underlay_addresses(index);
            nodes::make(self.paths, self.cluster, index)?;
            let api = format!("https://{}", SocketAddr::new(here.primary, running.port));
            agent::enroll(&running.authority, &self.paths.node(name).pki(), name, addresses, &api)?;
            let supervisor = nodes::Supervisor::new(self.paths, name, addresses, self.args.ways.clone());
            running.tasks.spawn(supervisor.run(self.shutdown.clone()));
        }
        Ok(running)
    }

    fn node_here(
        &self,
        running: &server::Running,
        name: &str,
        addresses: PerFamily<IpAddr>,
        programs: artifacts::Programs,
    ) -> anyhow::Result<Node> {
        let folder = self.paths.node(name).pki();
        Ok(Node {
            name: name.to_owned(),
            addresses,
            cluster: self.cluster.clone(),
            paths: self.paths.clone(),
            programs,
            serving: agent::serving(&running.authority, &folder, name, addresses)?,
            authority: running.authority.certificate().to_owned(),
            ways: self.args.ways.clone(),
        })
    }
}

/// Refuses what can't work, and takes the API's port; makes nothing.
fn preflight(paths: &Paths, args: &UpArgs) -> anyhow::Result<std::net::TcpListener> {
    artifacts::check()?;
    if let Some(pid) = lock::holder(&paths.server_lock()) {
        bail!("weft already runs with this data directory, as process {pid}");
    }
    let wanted = args.server.wanted(args.nodes);
    let cluster = Cluster::plan(&paths.cluster_file(), &wanted, &network::hostname())?;
    network::check_families(&cluster)?;
    server::listen(&args.server, &cluster)
}

/// What weft can't do without, each missing thing in one sentence.
fn check_machine() -> anyhow::Result<()> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "weft needs root: it makes network namespaces and loads eBPF programs"
    );
    let mounts = ["/sys/fs/cgroup/unified/cgroup.procs", "/sys/fs/cgroup/cgroup.procs"];
    ensure!(
        mounts.iter().any(|path| std::path::Path::new(path).exists()),
        "no cgroup2 file system is mounted, and eBPF attaches to one; mount it at /sys/fs/cgroup/unified"
    );
    Ok(())
}

/// The runtime of every role. Few threads: they wait more than they work, and each costs memory.
pub(crate) fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    let threads = std::thread::available_parallelism().map_or(2, usize::from).clamp(2, 8);
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(threads)
        .enable_all()
        .build()
        .context("cannot start the runtime")
}

/// The runtime of a role that is one loop: what a connection brings is taken in without waking another thread.
pub(crate) fn single_runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start the runtime")
}

/// Cancelled at SIGTERM or SIGINT.
pub(crate) fn shutdown_on_signal() -> anyhow::Result<CancellationToken> {
    use tokio::signal::unix::{SignalKind, signal};
    let shutdown = CancellationToken::new();
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let token = shutdown.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        token.cancel();
    });
    Ok(shutdown)
}

/// Waits until shutdown, or until a part ends by itself, which ends the others too; then until all have stopped.
pub(crate) async fn until_done(
    mut tasks: JoinSet<anyhow::Result<()>>,
    shutdown: &CancellationToken,
) -> anyhow::Result<()> {
    let first = tokio::select! {
        () = shutdown.cancelled() => Ok(()),
        ended = tasks.join_next() => match ended {
            Some(Ok(outcome)) => outcome,
            Some(Err(panic)) => Err(panic.into()),
            None => Ok(()),
        },
    };
    shutdown.cancel();
    let stop = async {
        while let Some(ended) = tasks.join_next().await {
            match ended {
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    tracing::warn!(error = format!("{error:#}"), "a part failed while stopping")
                }
                Err(error) => tracing::error!(%error, "a part broke down while stopping"),
            }
        }
    };
    if tokio::time::timeout(STOP_PATIENCE, stop).await.is_err() {
        tracing::warn!("some parts did not stop in time and are left behind");
    }
    first
}

/// Waits until every node of the cluster is Ready.
async fn nodes_ready(client: kube::Client, names: &[String]) -> anyhow::Result<()> {
    let api = kube::Api::<core::Node>::all(client);
    let mut events =
        watcher::watcher(api.clone(), watcher::Config::default()).default_backoff().applied_objects().boxed();
    let mut waiting: Vec<&String> = names.iter().collect();
    while !waiting.is_empty() {
        let Some(node) = events.try_next().await.context("cannot watch the nodes")? else {
            bail!("the watch of the nodes ended");
        };
        let conditions = node.status.iter().flat_map(|status| status.conditions.iter().flatten());
        let ready = conditions
            .filter(|condition| condition.type_ == "Ready")
            .any(|condition| condition.status == "True");
        if ready {
            waiting.retain(|name| **name != node.name_any());
        }
    }
    label_control_plane(&api, names).await
}

/// The node that the control plane runs beside, as kubeadm labels it. A kubelet may not give itself a role.
async fn label_control_plane(api: &kube::Api<core::Node>, names: &[String]) -> anyhow::Result<()> {
    let Some(first) = names.first() else { return Ok(()) };
    let label = serde_json::json!({"metadata": {"labels": {"node-role.kubernetes.io/control-plane": ""}}});
    let patched = api.patch(first, &kube::api::PatchParams::default(), &kube::api::Patch::Merge(label)).await;
    patched.map(|_| ()).with_context(|| format!("cannot label the node {first}"))
}

#[expect(clippy::print_stdout, reason = "this is the command's output")]
fn announce(paths: &Paths, cluster: &Cluster, port: u16, took: Duration, ready: Option<std::fs::File>) {
    let text = format!(
        "weft is up: {} node(s) Ready after {:.1} s\n  kubeconfig  {}\n  API         https://127.0.0.1:{port}\n",
        cluster.nodes.len(),
        took.as_secs_f64(),
        paths.admin_kubeconfig().display(),
    );
    match ready {
        Some(mut pipe) => {
            // The parent may have been interrupted; the cluster runs all the same.
            if let Err(error) = pipe.write_all(text.as_bytes()) {
                tracing::debug!(%error, "nobody waits for the cluster to be ready");
            }
        }
        None => print!("{text}"),
    }
}

fn ready_pipe() -> Option<std::fs::File> {
    let number: i32 = std::env::var(READY_FD).ok()?.parse().ok()?;
    // SAFETY: the parent made this descriptor for this process alone and named it in the environment.
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    // Children must not hold it open.
    nix::fcntl::fcntl(&fd, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC)).ok()?;
    Some(fd.into())
}

/// Starts `weft up` in the background and waits until it is ready. Where it runs already, there is nothing to do.
#[expect(clippy::print_stdout, reason = "this is the command's output")]
fn detach(paths: &Paths, args: &UpArgs) -> anyhow::Result<()> {
    if let Some(pid) = lock::holder(&paths.server_lock()) {
        println!("weft already runs, as process {pid}\n  kubeconfig  {}", paths.admin_kubeconfig().display());
        return Ok(());
    }
    // Checked here, where the terminal is, and again by the child.
    drop(preflight(paths, args)?);
    std::fs::create_dir_all(&paths.data)?;
    let log = std::fs::OpenOptions::new().create(true).append(true).open(paths.log_file())?;
    let (read, write) = nix::unistd::pipe().context("cannot make a pipe")?;
    nix::fcntl::fcntl(&read, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))?;
    let arguments = std::env::args_os().skip(1).filter(|argument| argument != "--detach");
    let mut command = std::process::Command::new(std::env::current_exe()?);
    command.args(arguments).env(READY_FD, write.as_raw_fd().to_string());
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    // SAFETY: setsid is async-signal-safe.
    unsafe {
        command.pre_exec(|| nix::unistd::setsid().map(|_| ()).map_err(Into::into));
    }
    let mut child = command.spawn().context("cannot start weft in the background")?;
    drop(write);
    let mut said = String::new();
    std::fs::File::from(read).read_to_string(&mut said)?;
    if said.is_empty() {
        let status = child.wait()?;
        bail!("weft up ended ({status}); the end of {}:\n{}", paths.log_file().display(), log_tail(paths));
    }
    print!("{said}");
    Ok(())
}

fn log_tail(paths: &Paths) -> String {
    let log = std::fs::read_to_string(paths.log_file()).unwrap_or_default();
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(5)..].join("\n")
}
