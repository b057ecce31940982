//! Chooses the connection to close when there are too many.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

/// Open connections by id, oldest first, at most `limit` of them.
pub struct Connections<T> {
    limit: usize,
    open: BTreeMap<u64, (IpAddr, T)>,
}

impl<T> Connections<T> {
    pub fn new(limit: usize) -> Self {
        Self {
            limit,
            open: BTreeMap::new(),
        }
    }

    /// Adds a connection. Beyond the limit, removes and returns the connection to close.
    pub fn add(&mut self, id: u64, peer: IpAddr, connection: T) -> Option<T> {
        self.open.insert(id, (peer, connection));
        if self.open.len() <= self.limit {
            return None;
        }
        self.close_one()
    }

    pub fn remove(&mut self, id: u64) -> Option<(IpAddr, T)> {
        self.open.remove(&id)
    }

    /// Removes and returns the oldest connection of the peer with the most connections. A peer with few connections
    /// keeps them. A connection from the same address as many others survives until `limit` newer ones are opened.
    pub fn close_one(&mut self) -> Option<T> {
        let mut counts = HashMap::<IpAddr, usize>::new();
        for (peer, _) in self.open.values() {
            *counts.entry(*peer).or_default() += 1;
        }
        let most = counts.values().copied().max()?;
        let (&id, _) = self.open.iter().find(|(_, (peer, _))| counts[peer] == most)?;
        self.open.remove(&id).map(|(_, connection)| connection)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(last: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, last])
    }

    #[test]
    fn peer_with_the_most_connections_loses_its_oldest() {
        let mut connections = Connections::new(4);
        // Peer 1, such as the kubelet, connects first and has only one connection.
        for (id, last) in [(1, 1), (2, 2), (3, 2), (4, 2)] {
            assert_eq!(connections.add(id, peer(last), id), None);
        }
        assert_eq!(connections.add(5, peer(3), 5), Some(2));
        assert_eq!(connections.add(6, peer(2), 6), Some(3));
        assert_eq!(connections.remove(1), Some((peer(1), 1)));
        assert_eq!(connections.add(7, peer(1), 7), None);
    }

    #[test]
    fn new_peer_replaces_the_oldest_if_all_peers_have_one_connection() {
        let mut connections = Connections::new(3);
        for id in 1..=3 {
            assert_eq!(connections.add(u64::from(id), peer(id), id), None);
        }
        assert_eq!(connections.add(4, peer(4), 4), Some(1));
    }

    #[test]
    fn connection_survives_until_limit_newer_ones_from_its_address() {
        let mut connections = Connections::new(10);
        for id in 0..9 {
            connections.add(id, peer(1), id);
        }
        connections.add(9, peer(1), 9);
        let closed: Vec<_> = (10..20).filter_map(|id| connections.add(id, peer(1), id)).collect();
        assert_eq!(closed, (0..10).collect::<Vec<_>>());
    }

    #[test]
    fn close_one_without_open_connections_returns_none() {
        assert_eq!(Connections::<u64>::new(1).close_one(), None);
    }
}
