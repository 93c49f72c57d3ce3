//! Owns the session of a primer, with the real kubectl.

use crate::support::{Cluster, have_kubectl};

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn first_light() {
    if !have_kubectl() {
        return;
    }
    let cluster = Cluster::start().await;
    let version = cluster.kubectl(&["version"]).await;
    assert!(version.contains("Server Version: v1.36"), "{version}");
    println!("{}", cluster.kubectl(&["get", "--raw", "/readyz?verbose"]).await);
    println!("{}", cluster.kubectl(&["get", "namespaces", "-o", "json"]).await);
    cluster.stop().await;
}
