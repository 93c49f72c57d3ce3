//! What the real kubectl makes of Deployments: rollouts, their history, and the way back.

use crate::support::{Plane, eventually};
use std::path::Path;
use std::time::Duration;
use tokio::process::Command;

async fn kubectl(config: &Path, args: &str) -> String {
    let output = Command::new("kubectl").arg("--kubeconfig").arg(config).args(args.split(' ')).output().await;
    let output = output.unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "kubectl {args}: {text}{errors}");
    text
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kubectl_rolls_out_and_back() {
    if !weft_tests_harness::require("kubectl_rolls_out_and_back", &["kubectl"]) {
        return;
    }
    let mut plane = Plane::start(2, Duration::from_secs(40)).await;
    let config = plane.serve().await;
    let run = |args: &'static str| kubectl(&config, args);
    run("create deployment web --image=one --replicas=2").await;
    let done = "deployment \"web\" successfully rolled out";
    assert!(run("rollout status deployment/web --timeout=30s").await.contains(done));
    run("set image deployment/web one=two").await;
    assert!(run("rollout status deployment/web --timeout=30s").await.contains(done));
    run("annotate deployment/web kubernetes.io/change-cause=second").await;
    eventually("the cause of the revision", || async {
        let history = run("rollout history deployment/web").await;
        let last = history.lines().rfind(|l| !l.trim().is_empty())?.to_owned();
        (last.starts_with('2') && last.ends_with("second")).then_some(())
    })
    .await;
    run("rollout undo deployment/web").await;
    assert!(run("rollout status deployment/web --timeout=30s").await.contains(done));
    let image = run("get deployment web -o jsonpath={.spec.template.spec.containers[0].image}").await;
    assert_eq!(image, "one");
    let history = run("rollout history deployment/web").await;
    let revisions: Vec<_> =
        history.lines().skip(2).filter_map(|l| l.split_whitespace().next()).map(str::to_owned).collect();
    assert_eq!(revisions, ["2", "3"], "{history}");
    run("rollout pause deployment/web").await;
    run("set image deployment/web one=three").await;
    run("rollout resume deployment/web").await;
    assert!(run("rollout status deployment/web --timeout=30s").await.contains(done));

    let described = eventually("events in describe", || async {
        let text = run("describe deployment web").await;
        text.contains("Scaled up replica set").then_some(text)
    })
    .await;
    for part in [
        "2 desired | 2 updated | 2 total | 2 available | 0 unavailable",
        "Available      True    MinimumReplicasAvailable",
        "Progressing    True    NewReplicaSetAvailable",
        "NewReplicaSet:   web-",
        "deployment-controller",
    ] {
        assert!(described.contains(part), "{part:?} is missing in:\n{described}");
    }
    let pods = run("get pods -l app=web").await;
    assert_eq!(pods.lines().filter(|l| l.contains("Running")).count(), 2, "{pods}");
    run("delete deployment web --cascade=foreground --timeout=30s").await;
    eventually("nothing is left", || async {
        run("get replicasets,pods -o name").await.trim().is_empty().then_some(())
    })
    .await;
    plane.stop().await;
}
