//! The artifact endpoint by its protocol: the built endpoint and a real `curl`.
//! Any bytes serve as a tarball here, for the endpoint looks at digests only.

mod access;
mod housekeeping;
mod load;
mod operator;
mod page;
mod publish;
mod refusals;
mod resumable;
mod stores;
mod storing;
