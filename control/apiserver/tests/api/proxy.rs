//! Owns requests passed on: what the other side sees of them, what the client sees of the answer, and where none is led to.

use crate::kubelet::{connect, set_up, upgrade};
use crate::support::Cluster;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const NODE: &str = "/api/v1/nodes/n1/proxy";
const POD: &str = "/api/v1/namespaces/default/pods/p";
const SERVICE: &str = "/api/v1/namespaces/default/services/s";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_other_side_sees_the_request_and_not_who_sent_it() {
    let cluster = Cluster::start().await;
    set_up(&cluster).await;
    let mut stream = connect(&cluster).await;
    let request = format!(
        "POST {NODE}/head?a=1&b=%2F HTTP/1.1\r\nHost: api\r\nAuthorization: Basic secret\r\nX-Own: kept\r\nX-Hop: gone\r\n\
         Impersonate-User: system:admin\r\nConnection: close, X-Hop\r\nTE: trailers\r\nContent-Length: 0\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    // The administrator may impersonate; the request is then that user's, who may not.
    assert!(answer.starts_with("HTTP/1.1 403 "), "{answer}");

    let mut stream = connect(&cluster).await;
    stream.write_all(request.replace("Impersonate-User: system:admin\r\n", "").as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let (head, body) = (head.to_lowercase(), body.to_lowercase());
    assert!(
        head.starts_with("http/1.1 201 ") && head.contains(&format!("location: {NODE}/made/1")),
        "{head}"
    );
    assert!(!head.contains("keep-alive"), "{head}");
    assert!(body.starts_with("post /head?a=1&b=%2f http/1.1\r\n") && body.contains("x-own: kept"), "{body}");
    assert!(body.contains(&format!("x-forwarded-uri: {NODE}/head")), "{body}");
    for hidden in ["secret", "x-hop", "te: "] {
        assert!(!body.contains(hidden), "{hidden} in {body}");
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn protocols_are_switched_behind_the_proxy() {
    let cluster = Cluster::start().await;
    set_up(&cluster).await;
    let mut stream = connect(&cluster).await;
    let request = format!(
        "GET {NODE}/talk?x=1 HTTP/1.1\r\nHost: api\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    );
    let answer = upgrade(&mut stream, &request).await;
    assert!(answer.to_lowercase().contains("x-path: /talk?x=1"), "{answer}");
    drop(stream);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_is_led_astray() {
    let cluster = Cluster::start().await;
    set_up(&cluster).await;
    let http = cluster.admin();
    let answer = http.get(&format!("{POD}/proxy?a=1")).await;
    assert_eq!(
        (answer.code, &answer.headers["location"]),
        (301, &format!("{POD}/proxy/?a=1").parse().unwrap())
    );
    for address in ["127.0.0.1", "169.254.169.254"] {
        let status = json!({"status": {"podIP": address, "podIPs": [{"ip": address}]}});
        assert_eq!(http.merge(&format!("{POD}/status"), &status).await.code, 200);
        let refused = (400, "BadRequest".into(), "address not allowed".into());
        assert_eq!(http.get(&format!("{POD}/proxy/")).await.failure(), refused);
    }
    assert_eq!(http.get(&format!("{POD}:x:y:z/proxy/")).await.code, 400);
    assert_eq!(http.get(&format!("{POD}x/proxy/")).await.code, 404);
    let service = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "s"},
        "spec": {"ports": [{"port": 80}]}});
    http.create("/api/v1/namespaces/default/services", &service).await;
    let unavailable = |text: &str| (503, "ServiceUnavailable".into(), text.into());
    let answer = http.get(&format!("{SERVICE}/proxy/")).await.failure();
    assert_eq!(answer, unavailable("no endpoints available for service \"s\""));
    let answer = http.get(&format!("{SERVICE}:81/proxy/")).await.failure();
    assert_eq!(answer, unavailable("no service port 81 found for service \"s\""));
    let nobody = cluster.http("nobody", &["system:authenticated"]);
    assert_eq!(nobody.get(&format!("{SERVICE}/proxy/")).await.code, 403);
    cluster.stop().await;
}
