//! Bad input over plain HTTPS: each with upstream's status and reason, and nothing changed.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::Stdio;

use anyhow::Context as _;
use serde_json::{Value, json};
use weft_tests_e2e::{cluster, sleeper};
use weft_tests_harness::cluster::Cluster;
use weft_tests_harness::require;

const JSON: &str = "application/json";
const YAML: &str = "application/yaml";
const MAPS: &str = "/api/v1/namespaces/default/configmaps";
const PODS: &str = "/api/v1/namespaces/default/pods";
const DEPLOYMENTS: &str = "/apis/apps/v1/namespaces/default/deployments";
/// More than the 3 MiB that a request body may have.
const HUGE_BYTES: usize = 3 * 1024 * 1024 + 1;

/// How a request proves who sends it.
#[derive(Clone, Copy)]
enum Credentials<'a> {
    Admin,
    Token(&'a str),
    None,
}

/// A client that sends what kubectl would refuse to.
struct Http<'a> {
    cluster: &'a Cluster,
    server: String,
    files: [PathBuf; 3],
}

impl<'a> Http<'a> {
    fn new(cluster: &'a Cluster) -> anyhow::Result<Self> {
        let value = |part: &str, key: &str| {
            let template =
                format!("go-template={{{{index (index .{part}s 0).{part} \"{key}\" | base64decode}}}}");
            cluster.kubectl(&["config", "view", "--raw", "-o", &template])
        };
        let server = cluster.kubectl(&["config", "view", "-o", "jsonpath={.clusters[0].cluster.server}"])?;
        let parts = [
            ("ca.pem", value("cluster", "certificate-authority-data")?),
            ("client.pem", value("user", "client-certificate-data")?),
            ("client.key", value("user", "client-key-data")?),
        ];
        let files = parts.map(|(name, text)| (cluster.data_dir().join(format!("test-{name}")), text));
        for (path, text) in &files {
            std::fs::write(path, text)?;
        }
        Ok(Self { cluster, server, files: files.map(|(path, _)| path) })
    }

    /// Sends a request; answers the status and the body.
    fn send(
        &self,
        (method, url): (&str, &str),
        (media_type, body): (&str, &[u8]),
        credentials: Credentials<'_>,
    ) -> anyhow::Result<(u16, String)> {
        let url = if url.starts_with('/') { format!("{}{url}", self.server) } else { url.to_owned() };
        let mut command = self.cluster.netns.command("curl")?;
        // Paths go out as they are, and a large body without asking first.
        command.args([
            "-sS",
            "--path-as-is",
            "--max-time",
            "30",
            "-X",
            method,
            "-w",
            "\n%{http_code}",
            "-H",
            "Expect:",
        ]);
        command.arg("--cacert").arg(&self.files[0]);
        match credentials {
            Credentials::Admin => {
                command.arg("--cert").arg(&self.files[1]).arg("--key").arg(&self.files[2]);
            }
            Credentials::Token(token) => {
                command.args(["-H", &format!("Authorization: Bearer {token}")]);
            }
            Credentials::None => {}
        }
        if method != "GET" {
            command.args(["-H", &format!("Content-Type: {media_type}"), "--data-binary", "@-"]);
        }
        let mut child =
            command.arg(url).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("run curl")?;
        // A server that refuses a body may stop reading it.
        let sent = child.stdin.take().expect("standard input is a pipe").write_all(body);
        let output = child.wait_with_output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let (answer, code) =
            text.rsplit_once('\n').with_context(|| format!("curl said {text:?}, sending: {sent:?}"))?;
        Ok((code.parse()?, answer.to_owned()))
    }

    /// Sends what must be refused: answers the code, the reason and the message of the Status.
    fn refused(
        &self,
        request: (&str, &str),
        content: (&str, &[u8]),
        credentials: Credentials<'_>,
    ) -> anyhow::Result<(u16, String, String)> {
        let (code, body) = self.send(request, content, credentials)?;
        let status: Value =
            serde_json::from_str(&body).with_context(|| format!("{request:?}: {code} {body}"))?;
        assert_eq!(status["kind"], "Status", "{request:?}: {status}");
        assert_eq!(status["status"], "Failure", "{request:?}: {status}");
        assert_eq!(status["code"], code, "{request:?}: {status}");
        let text = |key: &str| status[key].as_str().unwrap_or_default().to_owned();
        Ok((code, text("reason"), text("message")))
    }
}

struct Row {
    what: &'static str,
    request: (&'static str, String),
    content: (&'static str, Vec<u8>),
    expected: (u16, &'static str, &'static str),
}

#[test]
fn is_refused_as_upstream_does() -> anyhow::Result<()> {
    if !require("bad_input", &["curl"]) {
        return Ok(());
    }
    let Some(mut cluster) = cluster("bad_input", "bad", &[])? else { return Ok(()) };
    let http = Http::new(&cluster)?;
    cluster.kubectl(&["create", "configmap", "kept", "--from-literal=a=1"])?;
    cluster.kubectl(&["create", "deployment", "kept", "--image=busybox", "--replicas=0"])?;
    cluster.kubectl(&["rollout", "status", "deployment/kept", "--timeout=60s"])?;
    let objects = ["get", "pods,configmaps,deployments,secrets", "-o", "yaml"];
    let before = cluster.kubectl(&objects)?;
    for row in bodies().into_iter().chain(updates(&cluster)?) {
        let request = (row.request.0, row.request.1.as_str());
        let said = http.refused(request, (row.content.0, &row.content.1), Credentials::Admin)?;
        let (code, reason, part) = row.expected;
        assert_eq!((said.0, said.1.as_str()), (code, reason), "{}: {}", row.what, said.2);
        assert!(said.2.contains(part), "{}: {part} in {}", row.what, said.2);
    }
    credentials(&http)?;
    assert_eq!(cluster.kubectl(&objects)?, before, "something was changed");
    log_paths(&http)?;
    drop(http);
    cluster.purge()
}

fn create(
    what: &'static str,
    path: &str,
    content: (&'static str, impl Into<Vec<u8>>),
    expected: (u16, &'static str, &'static str),
) -> Row {
    Row { what, request: ("POST", path.to_owned()), content: (content.0, content.1.into()), expected }
}

fn map(metadata: &Value) -> String {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata}).to_string()
}

fn bodies() -> Vec<Row> {
    let strict = format!("{PODS}?fieldValidation=Strict");
    let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": {
        "contaners": [], "containers": [{"name": "a", "image": "b"}]}});
    let number =
        json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "x"}, "data": {"a": 1}});
    let mismatch = json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "x"}, "spec": {
        "selector": {"matchLabels": {"a": "b"}},
        "template": {"metadata": {"labels": {"a": "c"}}, "spec": {"containers": [{"name": "a", "image": "b"}]}}}});
    let nothing = json!({"apiVersion": "v1", "kind": "Nothing", "metadata": {"name": "x"}});
    let huge = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "x"}, "data": {
        "a": "x".repeat(HUGE_BYTES)}});
    vec![
        create(
            "unknown field",
            &strict,
            (JSON, pod.to_string()),
            (400, "BadRequest", "unknown field \"spec.contaners\""),
        ),
        create(
            "wrong type",
            MAPS,
            (JSON, number.to_string()),
            (400, "BadRequest", "cannot unmarshal number"),
        ),
        create(
            "no name",
            MAPS,
            (JSON, map(&json!({}))),
            (422, "Invalid", "name or generateName is required"),
        ),
        create(
            "invalid label",
            MAPS,
            (JSON, map(&json!({"name": "x", "labels": {"a": "b c"}}))),
            (422, "Invalid", "metadata.labels: Invalid value: \"b c\": a valid label must be"),
        ),
        create(
            "selector without its template's labels",
            DEPLOYMENTS,
            (JSON, mismatch.to_string()),
            (422, "Invalid", "`selector` does not match template `labels`"),
        ),
        create(
            "unknown resource",
            "/api/v1/namespaces/default/nothings",
            (JSON, nothing.to_string()),
            (404, "NotFound", "the server could not find the requested resource"),
        ),
        create("unknown kind", MAPS, (JSON, nothing.to_string()), (400, "BadRequest", "Nothing")),
        create("broken JSON", MAPS, (JSON, "{\"kind\": \"ConfigMap\","), (400, "BadRequest", "")),
        create("broken YAML", MAPS, (YAML, "kind: ConfigMap\n\tmetadata: ["), (400, "BadRequest", "yaml")),
        create("too large", MAPS, (JSON, huge.to_string()), (413, "RequestEntityTooLarge", "limit")),
        create(
            "unknown media type",
            MAPS,
            ("text/plain", map(&json!({"name": "x"}))),
            (415, "UnsupportedMediaType", "the body of the request was in an unknown format"),
        ),
        create(
            "a name that is a path",
            MAPS,
            (JSON, map(&json!({"name": "../x"}))),
            (422, "Invalid", "metadata.name: Invalid value: \"../x\""),
        ),
    ]
}

fn updates(cluster: &Cluster) -> anyhow::Result<Vec<Row>> {
    let read = |what: &str| -> anyhow::Result<Value> {
        Ok(serde_json::from_str(&cluster.kubectl(&["get", what, "kept", "-o", "json"])?)?)
    };
    let put = |what, path: &str, object: &Value, expected| Row {
        what,
        request: ("PUT", format!("{path}/kept")),
        content: (JSON, object.to_string().into_bytes()),
        expected,
    };
    let mut selector = read("deployment")?;
    selector["spec"]["selector"] = json!({"matchLabels": {"app": "kept", "more": "x"}});
    selector["spec"]["template"]["metadata"]["labels"] = json!({"app": "kept", "more": "x"});
    let mut stale = read("configmap")?;
    stale["metadata"]["resourceVersion"] = json!("1");
    stale["data"]["a"] = json!("2");
    let mut renamed = read("configmap")?;
    renamed["metadata"]["name"] = json!("other");
    let mut other_uid = read("configmap")?;
    other_uid["metadata"]["uid"] = json!("00000000-0000-0000-0000-000000000000");
    Ok(vec![
        put("immutable field", DEPLOYMENTS, &selector, (422, "Invalid", "field is immutable")),
        put("stale resourceVersion", MAPS, &stale, (409, "Conflict", "the object has been modified")),
        put(
            "another name than the path's",
            MAPS,
            &renamed,
            (400, "BadRequest", "does not match the name on the URL"),
        ),
        put("another uid", MAPS, &other_uid, (409, "Conflict", "UID")),
    ])
}

fn credentials(http: &Http<'_>) -> anyhow::Result<()> {
    let get = ("GET", PODS);
    let none = (JSON, b"".as_slice());
    let stranger = http.refused(get, none, Credentials::None)?;
    assert_eq!((stranger.0, stranger.1.as_str()), (403, "Forbidden"), "no credentials");
    assert!(stranger.2.contains("User \"system:anonymous\" cannot list resource \"pods\""), "{}", stranger.2);
    let liar = http.refused(get, none, Credentials::Token("abc"))?;
    assert_eq!((liar.0, liar.1.as_str()), (401, "Unauthorized"), "a token that isn't one");
    http.cluster.kubectl(&["create", "serviceaccount", "brief"])?;
    let token = http.cluster.kubectl(&["create", "token", "brief"])?;
    let token = Credentials::Token(token.trim());
    let known = http.refused(get, none, token)?;
    assert_eq!((known.0, known.1.as_str()), (403, "Forbidden"), "known, but without a role");
    assert!(
        known.2.contains("User \"system:serviceaccount:default:brief\" cannot list resource \"pods\""),
        "{}",
        known.2
    );
    http.cluster.kubectl(&["delete", "serviceaccount", "brief"])?;
    let gone = http.refused(get, none, token)?;
    assert_eq!((gone.0, gone.1.as_str()), (401, "Unauthorized"), "the account was deleted");
    Ok(())
}

/// Paths that climb out of the log folders, on the server and on the node itself.
fn log_paths(http: &Http<'_>) -> anyhow::Result<()> {
    http.cluster.apply(&sleeper("logged", None))?;
    http.cluster.kubectl(&["wait", "pod/logged", "--for=condition=Ready", "--timeout=60s"])?;
    let none = (JSON, b"".as_slice());
    let climb = format!("{PODS}/logged/log?container=..%2f..%2f..%2fetc");
    let said = http.refused(("GET", &climb), none, Credentials::Admin)?;
    assert_eq!((said.0, said.1.as_str()), (400, "BadRequest"), "{}", said.2);
    let address =
        http.cluster.kubectl(&["get", "nodes", "-o", "jsonpath={.items[0].status.addresses[0].address}"])?;
    let (code, body) =
        http.send(("GET", &format!("https://{address}:10250/logs/")), none, Credentials::Admin)?;
    assert_eq!(code, 200, "the folder itself may be read: {body}");
    for path in [
        "/logs/../../../etc/passwd",
        "/logs/..%2f..%2f..%2fetc%2fpasswd",
        "/logs/%2e%2e/%2e%2e/etc/passwd",
        "/containerLogs/default/logged/..%2f..%2fetc",
        "/containerLogs/default/..%2f..%2fetc/main",
        "/logs//etc/passwd",
    ] {
        let (code, body) =
            http.send(("GET", &format!("https://{address}:10250{path}")), none, Credentials::Admin)?;
        assert!([400, 404].contains(&code), "{path}: {code} {body}");
        assert!(!body.contains("root:"), "{path}: {body}");
    }
    Ok(())
}
