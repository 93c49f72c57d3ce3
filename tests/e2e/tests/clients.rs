//! The session's core with other clients: the Python `kubernetes` client and `kube`.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use futures::{AsyncBufReadExt as _, StreamExt as _, TryStreamExt as _};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;
use kube::api::{
    Api, DeleteParams, ListParams, LogParams, Patch, PatchParams, PostParams, WatchEvent, WatchParams,
};
use weft_tests_e2e::cluster;
use weft_tests_harness::cluster::Cluster;
use weft_tests_harness::{require, workspace};

const PYTHON_CLIENT: &str = "kubernetes==36.*";
const PATIENCE: Duration = Duration::from_secs(90);

#[test]
fn python() -> anyhow::Result<()> {
    if !require("clients::python", &["python3"]) {
        return Ok(());
    }
    let Some(mut cluster) = cluster("clients::python", "python", &[])? else { return Ok(()) };
    let python = python_client()?;
    let script = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests").join("clients").join("session.py");
    let output = cluster.netns.command(python)?.arg(script).arg(cluster.kubeconfig()).output()?;
    let said =
        [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
    ensure!(output.status.success() && said.contains("the session is over"), "{said}");
    cluster.purge()
}

/// An interpreter that has the client, made once below the target directory.
fn python_client() -> anyhow::Result<PathBuf> {
    let folder = workspace().join("target").join("python-client");
    let python = folder.join("bin").join("python");
    let has = |python: &PathBuf| Command::new(python).args(["-c", "import kubernetes"]).output();
    if has(&python).is_ok_and(|output| output.status.success()) {
        return Ok(python);
    }
    for command in [
        Command::new("python3").args(["-m", "venv"]).arg(&folder),
        Command::new(&python).args(["-m", "pip", "install", "-q", PYTHON_CLIENT]),
    ] {
        let output = command.output().with_context(|| format!("run {command:?}"))?;
        ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(python)
}

#[test]
fn kube_rs() -> anyhow::Result<()> {
    let Some(mut cluster) = cluster("clients::kube_rs", "kube", &[])? else { return Ok(()) };
    let session = std::thread::scope(|scope| {
        // Sockets belong to the namespace of the thread that makes them; a runtime of one thread has no other.
        let session = scope.spawn(|| -> anyhow::Result<()> {
            let namespace = std::fs::File::open(cluster.netns.path())?;
            nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNET)?;
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async { tokio::time::timeout(PATIENCE, kube_session(&cluster)).await? })
        });
        session.join()
    });
    session.expect("the session doesn't panic")?;
    cluster.purge()
}

async fn kube_session(cluster: &Cluster) -> anyhow::Result<()> {
    let file = kube::config::Kubeconfig::read_from(cluster.kubeconfig())?;
    let config =
        kube::Config::from_custom_kubeconfig(file, &kube::config::KubeConfigOptions::default()).await?;
    let client = kube::Client::try_from(config)?;
    let deployments: Api<Deployment> = Api::default_namespaced(client.clone());
    let pods: Api<Pod> = Api::default_namespaced(client);
    let deployment = serde_json::from_value(serde_json::json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "talk"},
        "spec": {"replicas": 1, "selector": {"matchLabels": {"app": "talk"}}, "template": {
            "metadata": {"labels": {"app": "talk"}},
            "spec": {"terminationGracePeriodSeconds": 0, "containers": [{
                "name": "main", "image": "busybox", "command": ["sh", "-c", "echo hello; sleep 100000"]}]}}}}))?;
    let made = deployments.create(&PostParams::default(), &deployment).await?;
    ensure!(made.metadata.generation == Some(1), "a new object has generation 1");
    let since = made.resource_version().context("a stored object has a version")?;
    available(&deployments, &since, 1).await?;

    let patch = serde_json::json!({"spec": {"replicas": 2}});
    let patched = deployments.patch("talk", &PatchParams::default(), &Patch::Merge(&patch)).await?;
    available(&deployments, &patched.resource_version().context("a stored object has a version")?, 2).await?;
    let list = pods.list(&ListParams::default().labels("app=talk")).await?;
    ensure!(list.items.len() == 2, "two pods carry the label, not {}", list.items.len());
    let name = list.items[0].name_any();

    let follow = LogParams { follow: true, ..LogParams::default() };
    let line = pods.log_stream(&name, &follow).await?.lines().try_next().await?;
    ensure!(line.as_deref() == Some("hello"), "the log says {line:?}");

    let error =
        deployments.create(&PostParams::default(), &deployment).await.expect_err("it is there already");
    ensure!(
        matches!(&error, kube::Error::Api(status) if status.code == 409 && status.reason == "AlreadyExists"),
        "{error}"
    );
    deployments.delete("talk", &DeleteParams::foreground()).await?;
    while deployments.get_opt("talk").await?.is_some() {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let left = pods.list(&ListParams::default().labels("app=talk")).await?;
    ensure!(left.items.is_empty(), "foreground deletion takes the pods first");
    Ok(())
}

/// Watches until the Deployment has so many available replicas.
async fn available(deployments: &Api<Deployment>, since: &str, count: i32) -> anyhow::Result<()> {
    let params = WatchParams::default().fields("metadata.name=talk");
    let mut events = deployments.watch(&params, since).await?.boxed();
    while let Some(event) = events.try_next().await? {
        if let WatchEvent::Modified(object) = event
            && object.status.and_then(|status| status.available_replicas) == Some(count)
        {
            return Ok(());
        }
    }
    anyhow::bail!("the watch ended first")
}
