//! How many requests a client may make: a bucket for each address that fills evenly and that
//! each request takes one from.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::num::NonZeroU32;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::http::header::RETRY_AFTER;
use axum::http::{HeaderValue, StatusCode};

use super::reply::Refusal;

/// How many seconds' worth of requests may come at once.
const BURST: f64 = 10.0;
/// How many addresses are remembered before those with full buckets are forgotten.
const ADDRESSES: usize = 10_000;

/// The buckets.
pub struct Rates {
    /// Requests a second; `None` is no limit.
    limit: Option<NonZeroU32>,
    /// What was in each bucket, and when.
    buckets: Mutex<HashMap<IpAddr, (f64, Instant)>>,
}

impl Rates {
    /// Full buckets that fill at `limit` requests a second.
    pub fn new(limit: Option<NonZeroU32>) -> Self {
        Self { limit, buckets: Mutex::default() }
    }

    /// Lets a request pass.
    ///
    /// # Errors
    /// 429 with the time after which there is room again.
    pub fn pass(&self, client: IpAddr) -> Result<(), Refusal> {
        let Some(limit) = self.limit.map(|limit| f64::from(limit.get())) else { return Ok(()) };
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        let filled =
            |(level, since): (f64, Instant)| (level + since.elapsed().as_secs_f64() * limit).min(limit * BURST);
        if buckets.len() > ADDRESSES {
            buckets.retain(|_, bucket| filled(*bucket) < limit * BURST);
        }
        let bucket = buckets.entry(network(client)).or_insert((limit * BURST, Instant::now()));
        let level = filled(*bucket);
        if level < 1.0 {
            let wait = Duration::from_secs_f64((1.0 - level) / limit).as_secs() + 1;
            let text = format!("this address makes more than {limit} requests a second; come again in {wait} s");
            return Err(Refusal::new(StatusCode::TOO_MANY_REQUESTS, text).header(RETRY_AFTER, HeaderValue::from(wait)));
        }
        *bucket = (level - 1.0, Instant::now());
        Ok(())
    }
}

/// Who counts as one client: an IPv4 address, or the /64 that an IPv6 network's hosts share.
fn network(client: IpAddr) -> IpAddr {
    match client {
        IpAddr::V4(_) => client,
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
    }
}
