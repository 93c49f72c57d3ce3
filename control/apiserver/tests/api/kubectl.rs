//! Owns the session of a primer, with the real kubectl.

use crate::support::{Cluster, have_kubectl};
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

const DEPLOYMENT: &str = "
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec: {containers: [{name: nginx, image: 'nginx:1', ports: [{containerPort: 80}]}]}
";

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn first_light() {
    if !have_kubectl() {
        return;
    }
    let cluster = Cluster::start().await;
    let k = async |args: &str| cluster.kubectl(&args.split(' ').collect::<Vec<_>>()).await;
    assert!(k("version").await.contains("Server Version: v1.36"));
    let ready = k("get --raw /readyz?verbose").await;
    assert!(ready.starts_with("[+]ping ok\n") && ready.ends_with("readyz check passed\n"), "{ready}");
    let namespaces = k("get namespaces").await;
    assert!(
        namespaces.starts_with("NAME              STATUS   AGE\ndefault           Active   "),
        "{namespaces}"
    );
    let made = cluster.kubectl_with(&["create", "-f", "-"], Some(DEPLOYMENT)).await;
    assert_eq!(made, "deployment.apps/web created\n");
    let same = cluster.kubectl_with(&["apply", "-f", "-"], Some(DEPLOYMENT)).await;
    assert_eq!(same, "deployment.apps/web configured\n");
    let same = cluster.kubectl_with(&["apply", "-f", "-"], Some(DEPLOYMENT)).await;
    assert_eq!(same, "deployment.apps/web unchanged\n");
    let other = DEPLOYMENT.replace("nginx:1", "nginx:2");
    assert!(cluster.kubectl_with(&["diff", "-f", "-"], Some(DEPLOYMENT)).await.is_empty());
    assert_eq!(
        cluster.kubectl_with(&["apply", "-f", "-"], Some(&other)).await,
        "deployment.apps/web configured\n"
    );
    assert_eq!(k("get deploy web -o jsonpath={.spec.template.spec.containers[0].image}").await, "nginx:2");
    assert_eq!(k("get deploy web -o jsonpath={.metadata.generation}").await, "2");
    let row = k("get deploy").await;
    assert!(
        row.starts_with(
            "NAME   READY   UP-TO-DATE   AVAILABLE   AGE\nweb    0/2     0            0           "
        ),
        "{row}"
    );
    assert_eq!(k("get deploy -o name").await, "deployment.apps/web\n");
    assert!(k("get deploy -A -o wide").await.contains("nginx:2"));
    assert!(k("get deploy web -o yaml").await.contains("progressDeadlineSeconds: 600"));
    assert!(k("describe deployment web").await.contains("Replicas:               2 desired"));
    assert_eq!(k("scale deploy/web --replicas=5").await, "deployment.apps/web scaled\n");
    assert_eq!(k("get deploy web -o jsonpath={.spec.replicas}").await, "5");
    assert_eq!(k("set image deploy/web nginx=nginx:3").await, "deployment.apps/web image updated\n");
    assert_eq!(k("label deploy web tier=front").await, "deployment.apps/web labeled\n");
    assert_eq!(k("annotate deploy web note=x").await, "deployment.apps/web annotated\n");
    assert!(k("get deploy -l tier=front -o name").await.contains("web"));
    for (kind, patch) in [
        ("strategic", r#"{"spec":{"template":{"spec":{"containers":[{"name":"side","image":"s"}]}}}}"#),
        ("merge", r#"{"spec":{"replicas":3}}"#),
        ("json", r#"[{"op":"replace","path":"/spec/replicas","value":4}]"#),
    ] {
        let args = ["patch", "deploy", "web", "--type", kind, "-p", patch];
        assert_eq!(cluster.kubectl(&args).await, "deployment.apps/web patched\n", "{kind}");
    }
    assert_eq!(k("get deploy web -o jsonpath={.spec.template.spec.containers[*].name}").await, "side nginx");
    assert_eq!(k("expose deploy web --port=80 --type=NodePort").await, "service/web exposed\n");
    let service = k("get svc web").await;
    assert!(service.starts_with("NAME   TYPE       CLUSTER-IP") && service.contains("80:3"), "{service}");
    assert_eq!(k("delete svc web").await, "service \"web\" deleted\n");
    assert_eq!(k("delete deploy web").await, "deployment.apps \"web\" deleted\n");
    let error = cluster.kubectl_fails("admin", &["get", "deploy", "web"], None).await;
    assert_eq!(error, "Error from server (NotFound): deployments.apps \"web\" not found\n");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn documents_and_access() {
    if !have_kubectl() {
        return;
    }
    let cluster = Cluster::start().await;
    let k = async |args: &str| cluster.kubectl(&args.split(' ').collect::<Vec<_>>()).await;
    let resources = k("api-resources").await;
    for line in [
        "pods                                po           v1  ",
        "deployments                         deploy       apps/v1 ",
    ] {
        assert!(resources.contains(line), "{resources}");
    }
    assert!(k("api-versions").await.contains("rbac.authorization.k8s.io/v1\n"));
    let explained = k("explain deployment.spec.replicas").await;
    assert!(explained.contains("FIELD: replicas <integer>"), "{explained}");
    assert!(k("explain pod").await.contains("VERSION:    v1"));
    let explained = k("explain pod.spec.containers").await;
    for part in
        ["List of containers belonging to the pod.", "A single application container", "Image pull policy."]
    {
        assert!(explained.contains(part), "{part} in {explained}");
    }
    assert_eq!(k("auth can-i create pods").await, "yes\n");
    assert!(k("auth whoami").await.contains("system:masters"));
    cluster.kubeconfig("jane", &["people"]);
    let error = cluster.kubectl_fails("jane", &["auth", "can-i", "create", "pods"], None).await;
    assert!(error.is_empty(), "{error}");
    let error = cluster.kubectl_fails("jane", &["get", "pods"], None).await;
    assert_eq!(
        error,
        "Error from server (Forbidden): pods is forbidden: User \"jane\" cannot list resource \
        \"pods\" in API group \"\" in the namespace \"default\"\n"
    );
    assert_eq!(k("create serviceaccount robot").await, "serviceaccount/robot created\n");
    assert_eq!(k("create token robot").await.trim().split('.').count(), 3);
    assert_eq!(k("create configmap c --from-literal=a=b").await, "configmap/c created\n");
    assert!(k("get events").await.is_empty());
    let error = cluster
        .kubectl_fails("admin", &["create", "-f", "-"], Some(&DEPLOYMENT.replace("replicas", "replixas")))
        .await;
    assert!(
        error.contains("Error from server (BadRequest)") && error.contains("unknown field \"spec.replixas\""),
        "{error}"
    );
    for (api_version, kind) in [("v1", "Widget"), ("example.com/v1", "Widget"), ("apps/v1", "Pod")] {
        let manifest = format!("apiVersion: {api_version}\nkind: {kind}\nmetadata: {{name: a}}\n");
        for verb in ["create", "apply"] {
            let error = cluster.kubectl_fails("admin", &[verb, "-f", "-"], Some(&manifest)).await;
            let expected = format!(
                "error: resource mapping not found for name: \"a\" namespace: \"\" from \"STDIN\": no matches for \
                 kind \"{kind}\" in version \"{api_version}\"\nensure CRDs are installed first\n"
            );
            assert_eq!(error, expected);
        }
    }
    // The document of OpenAPI v2, in its protobuf.
    let explained = k("explain deployment.spec.replicas --output=plaintext-openapiv2").await;
    assert!(
        explained.contains("KIND:     Deployment") && explained.contains("replicas <integer>"),
        "{explained}"
    );
    assert_eq!(k("delete configmap c --wait=true").await, "configmap \"c\" deleted\n");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn watching() {
    if !have_kubectl() {
        return;
    }
    let cluster = Cluster::start().await;
    let mut child = Command::new("kubectl")
        .arg("--kubeconfig")
        .arg(cluster.dir.path().join("admin.kubeconfig"))
        .args(["get", "configmaps", "-w", "--cache-dir"])
        .arg(cluster.dir.path().join("watch-cache"))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    for name in ["one", "two"] {
        cluster.kubectl(&["create", "configmap", name, "--from-literal=a=b"]).await;
    }
    let seen: Vec<String> =
        tokio::task::block_in_place(|| (0..3).map(|_| lines.next().unwrap().unwrap()).collect());
    assert!(
        seen[0].starts_with("NAME") && seen[1].starts_with("one") && seen[2].starts_with("two"),
        "{seen:?}"
    );
    child.kill().unwrap();
    child.wait().unwrap();
    cluster.stop().await;
}
