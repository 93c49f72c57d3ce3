//! `weft policy learn`: policies proposed from traffic let the same traffic pass, and nothing else.

use std::io::{BufRead as _, BufReader, Read as _};
use std::process::{Child, ChildStderr, Output, Stdio};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use weft_tests_e2e::{cluster, nginx};
use weft_tests_harness::cluster::Cluster;
use weft_tests_harness::wait_until;

const PATIENCE: Duration = Duration::from_secs(60);

/// Clients of their own labels, in the namespace and in another, and what is asked.
const WORKLOAD: &str = "apiVersion: v1
kind: Namespace
metadata: {name: away}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {selector: {app: web}, ports: [{port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: other}
spec: {selector: {app: other}, ports: [{port: 80}]}
";

fn client(namespace: &str, name: &str) -> String {
    format!(
        "---
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: {namespace}, labels: {{app: {name}}}}}
spec:
  terminationGracePeriodSeconds: 0
  containers: [{{name: main, image: busybox, command: [sleep, \"100000\"]}}]
"
    )
}

#[test]
fn what_was_seen_goes_on_and_nothing_else() -> anyhow::Result<()> {
    let Some(mut cluster) =
        cluster("learn::what_was_seen_goes_on_and_nothing_else", "learn", &["--nodes", "2"])?
    else {
        return Ok(());
    };
    let pods = [("default", "client"), ("default", "stranger"), ("away", "guest")];
    let clients: String = pods.iter().map(|(namespace, name)| client(namespace, name)).collect();
    cluster.apply(&[WORKLOAD, &clients].concat())?;
    cluster.apply(&format!("{}---\n{}", nginx("web", 2), nginx("other", 1)))?;
    for deployment in ["deployment/web", "deployment/other"] {
        cluster.kubectl(&["rollout", "status", deployment, "--timeout=60s"])?;
    }
    for (namespace, name) in pods {
        let pod = format!("pod/{name}");
        cluster.kubectl(&["wait", "-n", namespace, &pod, "--for=condition=Ready", "--timeout=60s"])?;
    }
    let proposed = learn(&cluster)?;
    for part in ["learned-client", "learned-web", "kubernetes.io/metadata.name: away", "10.43.0.10/32"] {
        ensure!(proposed.contains(part), "{part} is not in:\n{proposed}");
    }
    // Neither what changes, nor who was silent, nor the probes of the node and who has an address for now.
    for part in ["pod-template-hash", "stranger", "10.42."] {
        ensure!(!proposed.contains(part), "{part} is in:\n{proposed}");
    }
    let left = cluster.kubectl(&["get", "networkpolicies", "-A", "-o", "name"])?;
    ensure!(left.is_empty(), "it left {left}");

    cluster.apply(&proposed)?;
    refused(&cluster, "default", "stranger", "http://web")?;
    refused(&cluster, "default", "client", "http://other")?;
    for _ in 0..3 {
        // By name: DNS goes on too.
        asks(&cluster, "default", "client", "http://web")?;
        asks(&cluster, "away", "guest", "http://web.default")?;
    }
    // Nothing was seen of it, so nothing is proposed, and it is as free as before.
    asks(&cluster, "default", "stranger", "http://other")?;
    cluster.purge()
}

/// Learns while the two clients ask, on every node that a backend may be on.
fn learn(cluster: &Cluster) -> anyhow::Result<String> {
    // Nobody listens to what it says further.
    let (learning, _) = watching(cluster, &["--duration", "15s"])?;
    for _ in 0..5 {
        asks(cluster, "default", "client", "http://web")?;
        asks(cluster, "away", "guest", "http://web.default")?;
    }
    let output = ended(learning)?;
    ensure!(output.status.success(), "{output:?}");
    Ok(String::from_utf8(output.stdout)?)
}

/// One that has said that it watches, and the rest of what it says.
fn watching(cluster: &Cluster, flags: &[&str]) -> anyhow::Result<(Child, BufReader<ChildStderr>)> {
    let mut learning = cluster
        .weft()?
        .args(["policy", "learn"])
        .args(flags)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    // It says so within seconds, or ends.
    let mut errors = BufReader::new(learning.stderr.take().context("a pipe")?);
    let mut said = String::new();
    while !said.contains("watching ") {
        if errors.read_line(&mut said)? == 0 {
            anyhow::bail!("{}: it said {said}", learning.wait()?);
        }
    }
    Ok((learning, errors))
}

fn ended(mut child: Child) -> anyhow::Result<Output> {
    let status = wait_until("it ends", PATIENCE, || Ok(child.try_wait()?));
    if status.is_err() {
        child.kill()?;
    }
    status?;
    Ok(child.wait_with_output()?)
}

fn asks(cluster: &Cluster, namespace: &str, pod: &str, url: &str) -> anyhow::Result<()> {
    let said =
        cluster.kubectl(&["exec", "-n", namespace, pod, "--", "timeout", "10", "wget", "-qO-", url])?;
    ensure!(said.contains("nginx") || said.contains("html"), "{said}");
    Ok(())
}

/// Waits until a policy keeps a pod from a Service.
fn refused(cluster: &Cluster, namespace: &str, pod: &str, url: &str) -> anyhow::Result<()> {
    wait_until(&format!("{pod} is kept from {url}"), PATIENCE, || {
        let args = ["exec", "-n", namespace, pod, "--", "timeout", "3", "wget", "-qO-", url];
        Ok(cluster.kubectl(&args).is_err().then_some(()))
    })
}

const TRIAL: &str = "networkpolicy.networking.k8s.io/weft-policy-learn";

/// However a run ends, the policy on trial goes with it or with the next run, and nobody else's is touched.
#[test]
fn the_policy_on_trial_does_not_stay() -> anyhow::Result<()> {
    let Some(mut cluster) = cluster("learn::the_policy_on_trial_does_not_stay", "learnt", &[])? else {
        return Ok(());
    };
    cluster.apply(&client("default", "client"))?;
    cluster.kubectl(&["wait", "pod/client", "--for=condition=Ready", "--timeout=60s"])?;
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let (learning, errors) = watching(&cluster, &["--duration", "1h"])?;
        ensure!(policies(&cluster)? == TRIAL, "no policy while it watches");
        kill(pid(&learning)?, signal)?;
        fails(learning, errors, "interrupted")?;
        ensure!(policies(&cluster)?.is_empty(), "{signal} leaves {}", policies(&cluster)?);
    }
    // Killed, it leaves the policy to the next run; which may be taken over in its turn while it lives.
    let (mut killed, _) = watching(&cluster, &["--duration", "1h"])?;
    killed.kill()?;
    killed.wait()?;
    ensure!(policies(&cluster)? == TRIAL, "nobody was there to remove it");
    let (second, errors) = watching(&cluster, &["--duration", "1h"])?;
    let (third, _) = watching(&cluster, &["--duration", "10s"])?;
    fails(second, errors, "another run has taken over the NetworkPolicy default/weft-policy-learn")?;
    let third = ended(third)?;
    ensure!(third.status.success(), "the run that was left alone: {third:?}");
    ensure!(policies(&cluster)?.is_empty(), "it leaves {}", policies(&cluster)?);
    // Whoever removes it in between has flows missed.
    let (learning, errors) = watching(&cluster, &["--duration", "1h"])?;
    cluster.kubectl(&["delete", TRIAL])?;
    fails(learning, errors, "somebody has removed the NetworkPolicy")?;
    cluster.purge()
}

#[test]
fn what_cannot_be_learned_is_said_and_changes_nothing() -> anyhow::Result<()> {
    let Some(mut cluster) =
        cluster("learn::what_cannot_be_learned_is_said_and_changes_nothing", "learnb", &[])?
    else {
        return Ok(());
    };
    cluster.kubectl(&["create", "namespace", "empty"])?;
    for (flags, said) in [
        (vec!["-n", "nowhere"], "there is no namespace nowhere"),
        (vec!["-n", "empty"], "no pod of namespace empty runs here with an address of its own"),
        (vec!["-n", ""], "a value is required"),
        (vec!["--duration", "0s"], "\"0s\" is no duration"),
        (vec!["--duration", "soon"], "\"soon\" is no duration"),
        (vec!["--kubeconfig", "/nowhere"], "cannot use /nowhere"),
    ] {
        refuses(&cluster, &flags, said)?;
    }
    cluster.apply(&client("empty", "client"))?;
    cluster.kubectl(&["wait", "-n", "empty", "pod/client", "--for=condition=Ready", "--timeout=60s"])?;
    // It has the rights of whose kubeconfig it is given, and no others.
    let user = user(&cluster)?;
    let learn = ["-n", "empty", "--duration", "1s", "--kubeconfig", &user];
    refuses(&cluster, &learn, "cannot get the Namespace empty")?;
    cluster.apply(RIGHTS)?;
    let output = cluster.weft()?.args(["policy", "learn"]).args(learn).stdin(Stdio::null()).output()?;
    ensure!(output.status.success(), "{output:?}");
    ensure!(policies(&cluster)?.is_empty(), "it leaves {}", policies(&cluster)?);

    // A policy of that name that somebody else made.
    let own = "apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: weft-policy-learn, namespace: empty}
spec: {podSelector: {matchLabels: {app: nobody}}}
";
    cluster.apply(own)?;
    refuses(&cluster, &["-n", "empty"], "is not of `weft policy learn`")?;
    ensure!(policies(&cluster)? == TRIAL, "it removed another's policy");
    cluster.purge()
}

/// What the documentation says that it takes.
const RIGHTS: &str = "apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: learn}
rules:
- {apiGroups: [''], resources: [namespaces], verbs: [get]}
- {apiGroups: [''], resources: [pods, nodes], verbs: [list]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: learn}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: learn}
subjects: [{kind: ServiceAccount, name: learner, namespace: empty}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: learn, namespace: empty}
rules:
- {apiGroups: [networking.k8s.io], resources: [networkpolicies], verbs: [get, create, update, delete]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: learn, namespace: empty}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: learn}
subjects: [{kind: ServiceAccount, name: learner, namespace: empty}]
";

/// A kubeconfig of somebody without rights.
fn user(cluster: &Cluster) -> anyhow::Result<String> {
    cluster.kubectl(&["create", "-n", "empty", "serviceaccount", "learner"])?;
    let token = cluster.kubectl(&["create", "-n", "empty", "token", "learner"])?;
    let config = cluster.kubectl(&["config", "view", "--raw", "-o", "json"])?;
    let mut config: serde_json::Value = serde_json::from_str(&config)?;
    config["users"][0]["user"] = serde_json::json!({"token": token.trim()});
    let path = cluster.data_dir().join("learner.kubeconfig");
    std::fs::write(&path, config.to_string())?;
    Ok(path.to_string_lossy().into_owned())
}

fn policies(cluster: &Cluster) -> anyhow::Result<String> {
    Ok(cluster.kubectl(&["get", "networkpolicies", "-A", "-o", "name"])?.trim().to_owned())
}

fn refuses(cluster: &Cluster, flags: &[&str], said: &str) -> anyhow::Result<()> {
    let before = policies(cluster)?;
    let output = cluster.weft()?.args(["policy", "learn"]).args(flags).stdin(Stdio::null()).output()?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(2), "{flags:?}: {output:?}");
    ensure!(errors.contains(said) && output.stdout.is_empty(), "{flags:?}: {output:?}");
    ensure!(policies(cluster)? == before, "{flags:?} changes something");
    Ok(())
}

/// It ends without an answer, and says this.
fn fails(child: Child, mut errors: BufReader<ChildStderr>, said: &str) -> anyhow::Result<()> {
    let output = ended(child)?;
    let mut rest = String::new();
    errors.read_to_string(&mut rest)?;
    ensure!(output.status.code() == Some(2) && output.stdout.is_empty(), "{output:?}: {rest}");
    ensure!(rest.contains(said), "it said {rest}");
    Ok(())
}

fn pid(child: &Child) -> anyhow::Result<Pid> {
    Ok(Pid::from_raw(i32::try_from(child.id())?))
}
