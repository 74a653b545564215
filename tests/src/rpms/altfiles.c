/* Stands in for nss-altfiles, which Debian does not have: the NSS service "altfiles"
 * of a composed tree, whose accounts are in /usr/lib/passwd and /usr/lib/group. */
#include <errno.h>
#include <grp.h>
#include <nss.h>
#include <pwd.h>
#include <stdio.h>
#include <string.h>

/* The next entry that MATCH holds for. */
#define LOOK_UP(FILE_NAME, READ, TYPE, MATCH)                                  \
	FILE *file = fopen(FILE_NAME, "re");                                   \
	if (!file)                                                             \
		return NSS_STATUS_NOTFOUND;                                    \
	TYPE *found = NULL;                                                    \
	int failed;                                                            \
	while ((failed = READ(file, entry, buffer, length, &found)) == 0)      \
		if (MATCH)                                                     \
			break;                                                 \
	fclose(file);                                                          \
	if (failed == ERANGE) {                                                \
		*error = ERANGE;                                               \
		return NSS_STATUS_TRYAGAIN;                                    \
	}                                                                      \
	return failed ? NSS_STATUS_NOTFOUND : NSS_STATUS_SUCCESS;

enum nss_status _nss_altfiles_getpwnam_r(const char *name, struct passwd *entry, char *buffer, size_t length, int *error)
{
	LOOK_UP("/usr/lib/passwd", fgetpwent_r, struct passwd, strcmp(entry->pw_name, name) == 0)
}

enum nss_status _nss_altfiles_getpwuid_r(uid_t uid, struct passwd *entry, char *buffer, size_t length, int *error)
{
	LOOK_UP("/usr/lib/passwd", fgetpwent_r, struct passwd, entry->pw_uid == uid)
}

enum nss_status _nss_altfiles_getgrnam_r(const char *name, struct group *entry, char *buffer, size_t length, int *error)
{
	LOOK_UP("/usr/lib/group", fgetgrent_r, struct group, strcmp(entry->gr_name, name) == 0)
}

enum nss_status _nss_altfiles_getgrgid_r(gid_t gid, struct group *entry, char *buffer, size_t length, int *error)
{
	LOOK_UP("/usr/lib/group", fgetgrent_r, struct group, entry->gr_gid == gid)
}
