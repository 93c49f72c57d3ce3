//! What the fuzzer feeds: queries, to a server of a few names.

use std::sync::Arc;

use hickory_proto::op::{Message, MessageType};
use parking_lot::RwLock;
use tokio::sync::Semaphore;

use super::{Decision, EDNS_UDP_BYTES, IN_FLIGHT, Shared, encode};
use crate::answer::Zone;
use crate::forward::Forwarder;
use crate::index::{Endpoint, Index, Port, Service, Slice, Target};

/// Endpoints of the headless Service: more than a datagram has room for.
const ENDPOINTS: u8 = 100;

/// A server of the namespace `default`: `db` headless with an address that has a name, `web` an alias, `api` with addresses.
pub struct Server(Shared);

impl Server {
    /// `None` only if `cluster.local` were no domain.
    #[must_use]
    pub fn new() -> Option<Self> {
        let index = Arc::new(RwLock::new(names()));
        let in_flight = Arc::new(Semaphore::new(IN_FLIGHT));
        let forwarder = Forwarder::new(Vec::new());
        Some(Self(Shared { zone: Zone::new("cluster.local")?, index, forwarder, in_flight }))
    }

    /// Answers a query from the tables alone; the reply's bytes. A reply belongs to its query, and fits.
    #[must_use]
    pub fn query(&self, datagram: &[u8], over_udp: bool) -> Option<Vec<u8>> {
        let message = Message::from_vec(datagram).ok()?;
        let reply = match self.0.decide(&message) {
            Decision::Reply(reply) | Decision::Follow(reply, ..) => reply,
            Decision::Forward | Decision::Ignore => return None,
        };
        let bytes = encode(&message, &reply, over_udp)?;
        let read = Message::from_vec(&bytes).expect("a reply can be read");
        assert_eq!(read.metadata.message_type, MessageType::Response);
        assert_eq!(read.metadata.id, message.metadata.id);
        assert!(!over_udp || bytes.len() <= usize::from(EDNS_UDP_BYTES), "{} bytes over UDP", bytes.len());
        Some(bytes)
    }
}

fn names() -> Index {
    let mut index = Index::default();
    index.set_services_listed();
    index.set_slices_listed();
    let port = || Port { name: "http".to_owned(), protocol: "tcp".to_owned(), port: 80 };
    let targets = [
        ("db", Target::Endpoints),
        ("web", Target::Alias("www.example.org".to_owned())),
        ("loop", Target::Alias("loop.default.svc.cluster.local".to_owned())),
        ("api", Target::Addresses(vec![[10, 43, 0, 7].into(), [0xfd00, 0, 0, 0, 0, 0, 0, 7].into()])),
    ];
    for (name, target) in targets {
        let service = Service { target, ports: vec![port()], publish_not_ready: false };
        index.put_service("default", name, service);
    }
    let endpoint = |n: u8| Endpoint {
        address: [10, 42, 0, n].into(),
        hostname: (n == 1).then(|| "db-0".to_owned()),
        ready: n != 2,
    };
    let endpoints = (1..=ENDPOINTS).map(endpoint).collect();
    index.put_slice("default", "db-1", Slice { service: "db".to_owned(), endpoints, ports: vec![port()] });
    index
}
