//! Queries over real sockets on loopback.

use hickory_proto::op::Query;
use hickory_proto::rr::RData;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::index::{Endpoint, Service, Slice, Target};

fn index(endpoints: u8) -> Index {
    let mut index = Index::default();
    index.set_services_listed();
    index.set_slices_listed();
    let headless = Service { target: Target::Endpoints, ports: Vec::new(), publish_not_ready: false };
    index.put_service("default", "db", headless);
    let endpoint = |n| Endpoint { address: [10, 42, 0, n].into(), hostname: None, ready: true };
    let slice = Slice {
        service: "db".to_owned(),
        endpoints: (1..=endpoints).map(endpoint).collect(),
        ports: Vec::new(),
    };
    index.put_slice("default", "db-1", slice);
    let alias = Service {
        target: Target::Alias("www.example.org".to_owned()),
        ports: Vec::new(),
        publish_not_ready: false,
    };
    index.put_service("default", "web", alias);
    index
}

async fn server(index: Index, upstreams: Vec<SocketAddr>) -> (SocketAddr, CancellationToken) {
    let zone = Zone::new("cluster.local").unwrap();
    // UDP and TCP share the port: take one that is free for both.
    let server = loop {
        let probe = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = probe.local_addr().unwrap();
        drop(probe);
        let index = Arc::new(RwLock::new(Index::default()));
        if let Ok(server) =
            Server::bind(address, zone.clone(), index, Forwarder::new(upstreams.clone())).await
        {
            break server;
        }
    };
    *server.shared.index.write() = index;
    let address = server.udp.local_addr().unwrap();
    let stop = CancellationToken::new();
    let stopped = stop.clone();
    tokio::spawn(async move { stopped.run_until_cancelled(server.serve()).await });
    (address, stop)
}

fn question(name: &str, kind: RecordType) -> Vec<u8> {
    let mut query = Message::query();
    query.metadata.id = 77;
    query.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    query.to_vec().unwrap()
}

async fn over_udp(server: SocketAddr, query: &[u8]) -> Message {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    socket.send_to(query, server).await.unwrap();
    let mut reply = vec![0; 4096];
    let length = timeout(Duration::from_secs(20), socket.recv(&mut reply)).await.unwrap().unwrap();
    Message::from_vec(&reply[..length]).unwrap()
}

#[tokio::test]
async fn a_long_reply_is_truncated_over_udp_and_whole_over_tcp() {
    let (address, _stop) = server(index(100), Vec::new()).await;
    let query = question("db.default.svc.cluster.local.", RecordType::A);
    let short = over_udp(address, &query).await;
    assert!(short.metadata.truncation && short.answers.is_empty());
    let mut stream = TcpStream::connect(address).await.unwrap();
    write_message(&mut stream, &query).await.unwrap();
    let whole = Message::from_vec(&read_message(&mut stream).await.unwrap().unwrap()).unwrap();
    assert_eq!(whole.answers.len(), 100);
    assert!(!whole.metadata.truncation && whole.metadata.authoritative);
}

#[tokio::test]
async fn other_names_go_to_the_resolvers_and_aliases_are_followed() {
    let upstream = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let upstream_address = upstream.local_addr().unwrap();
    tokio::spawn(async move {
        let mut buffer = vec![0; 512];
        while let Ok((length, client)) = upstream.recv_from(&mut buffer).await {
            let query = Message::from_vec(&buffer[..length]).unwrap();
            let mut reply = reply_to(&query);
            let data = RData::A(hickory_proto::rr::rdata::A([192, 0, 2, 1].into()));
            reply.add_answer(hickory_proto::rr::Record::from_rdata(
                query.queries[0].name().clone(),
                60,
                data,
            ));
            upstream.send_to(&reply.to_vec().unwrap(), client).await.unwrap();
        }
    });
    let (address, _stop) = server(index(1), vec![upstream_address]).await;
    let elsewhere = over_udp(address, &question("www.example.org.", RecordType::A)).await;
    assert_eq!(elsewhere.answers.len(), 1);
    let alias = over_udp(address, &question("web.default.svc.cluster.local.", RecordType::A)).await;
    let kinds: Vec<RecordType> = alias.answers.iter().map(hickory_proto::rr::Record::record_type).collect();
    assert_eq!(kinds, [RecordType::CNAME, RecordType::A]);
}

#[tokio::test]
async fn without_resolvers_other_names_fail_and_unknown_ones_of_the_cluster_do_not_exist() {
    let (address, _stop) = server(index(1), Vec::new()).await;
    let elsewhere = over_udp(address, &question("www.example.org.", RecordType::A)).await;
    assert_eq!(elsewhere.metadata.response_code, ResponseCode::ServFail);
    let unknown = over_udp(address, &question("nothing.default.svc.cluster.local.", RecordType::A)).await;
    assert_eq!(unknown.metadata.response_code, ResponseCode::NXDomain);
    assert_eq!(unknown.authorities.len(), 1);
}
