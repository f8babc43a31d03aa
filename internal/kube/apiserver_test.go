package kube_test

import (
	"encoding/json"
	"encoding/pem"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	authv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/internal/kube"
	"github.com/trivet-csi/trivet/internal/testutil"
)

const (
	namespace = "trivet-system"
	apiToken  = "the-pods-own-token"
)

// apiServer is the part of a Kubernetes API server that is used, over HTTPS, in memory. It keeps
// Secrets and ConfigMaps with resource versions, and answers TokenReviews from a table.
type apiServer struct {
	t    *testing.T
	http *httptest.Server

	mu      sync.Mutex
	version int
	secrets map[string]*corev1.Secret
	maps    map[string]*corev1.ConfigMap
	tokens  map[string]authv1.TokenReviewStatus
	reviews []authv1.TokenReviewSpec
	before  func(method, path string) int // called unlocked at each request; a code other than 0 is the answer
}

func newAPIServer(t *testing.T) *apiServer {
	t.Helper()
	s := &apiServer{
		t: t, secrets: map[string]*corev1.Secret{}, maps: map[string]*corev1.ConfigMap{},
		tokens: map[string]authv1.TokenReviewStatus{},
	}
	mux := http.NewServeMux()
	const prefix = "/api/v1/namespaces/" + namespace
	mux.HandleFunc("GET "+prefix+"/secrets/{name}", func(w http.ResponseWriter, r *http.Request) {
		get(s, w, r, s.secrets)
	})
	mux.HandleFunc("POST "+prefix+"/secrets", func(w http.ResponseWriter, r *http.Request) {
		put(s, w, r, s.secrets, &corev1.Secret{}, true)
	})
	mux.HandleFunc("GET "+prefix+"/configmaps/{name}", func(w http.ResponseWriter, r *http.Request) {
		get(s, w, r, s.maps)
	})
	mux.HandleFunc("POST "+prefix+"/configmaps", func(w http.ResponseWriter, r *http.Request) {
		put(s, w, r, s.maps, &corev1.ConfigMap{}, true)
	})
	mux.HandleFunc("PUT "+prefix+"/configmaps/{name}", func(w http.ResponseWriter, r *http.Request) {
		put(s, w, r, s.maps, &corev1.ConfigMap{}, false)
	})
	mux.HandleFunc("POST /apis/authentication.k8s.io/v1/tokenreviews", s.review)
	s.http = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		before := s.before
		s.mu.Unlock()
		if r.Header.Get("Authorization") != "Bearer "+apiToken {
			s.refuse(w, http.StatusUnauthorized, metav1.StatusReasonUnauthorized)
			return
		}
		if before != nil {
			if code := before(r.Method, r.URL.Path); code != 0 {
				s.refuse(w, code, metav1.StatusReasonUnknown)
				return
			}
		}
		mux.ServeHTTP(w, r)
	}))
	// Not 127.0.0.1: the port of one that is closed may be another test's there, who answers in its place.
	require.NoError(t, s.http.Listener.Close())
	var err error
	s.http.Listener, err = (&net.ListenConfig{}).Listen(t.Context(), "tcp", net.JoinHostPort(testutil.Loopback(), "0"))
	require.NoError(t, err)
	s.http.StartTLS()
	t.Cleanup(s.http.Close)
	return s
}

// client returns the real client of the server.
func (s *apiServer) client() *kube.API {
	s.t.Helper()
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.http.Certificate().Raw})
	api, err := kube.NewAPI(&rest.Config{
		Host: s.http.URL, BearerToken: apiToken,
		TLSClientConfig: rest.TLSClientConfig{CAData: ca, ServerName: "example.com"}, // which httptest's is of
	}, namespace)
	require.NoError(s.t, err)
	return api
}

// intercept has f called at each request from now on.
func (s *apiServer) intercept(f func(method, path string) int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.before = f
}

// data returns the data of the ConfigMap, nil when there is none.
func (s *apiServer) data() map[string]string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if m, ok := s.maps[kube.ConfigMapName]; ok {
		return m.Data
	}
	return nil
}

// setData replaces the data of the ConfigMap as somebody else would.
func (s *apiServer) setData(data map[string]string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.version++
	s.maps[kube.ConfigMapName] = &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Name: kube.ConfigMapName, ResourceVersion: strconv.Itoa(s.version)}, Data: data,
	}
}

func (s *apiServer) secret() *corev1.Secret {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.secrets[kube.SecretName].DeepCopy()
}

func (s *apiServer) setSecret(data map[string][]byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if data == nil {
		delete(s.secrets, kube.SecretName)
		return
	}
	s.secrets[kube.SecretName] = &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: kube.SecretName}, Data: data}
}

func get[T any](s *apiServer, w http.ResponseWriter, r *http.Request, objects map[string]T) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if o, ok := objects[r.PathValue("name")]; ok {
		s.answer(w, http.StatusOK, o)
		return
	}
	s.refuse(w, http.StatusNotFound, metav1.StatusReasonNotFound)
}

func put[T metav1.Object](
	s *apiServer, w http.ResponseWriter, r *http.Request, objects map[string]T, o T, create bool,
) {
	if !assert.NoError(s.t, json.NewDecoder(r.Body).Decode(o)) {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	old, ok := objects[o.GetName()]
	switch {
	case create && ok:
		s.refuse(w, http.StatusConflict, metav1.StatusReasonAlreadyExists)
		return
	case !create && !ok:
		s.refuse(w, http.StatusNotFound, metav1.StatusReasonNotFound)
		return
	case !create && o.GetResourceVersion() != "" && o.GetResourceVersion() != old.GetResourceVersion():
		s.refuse(w, http.StatusConflict, metav1.StatusReasonConflict)
		return
	}
	s.version++
	o.SetResourceVersion(strconv.Itoa(s.version))
	objects[o.GetName()] = o
	s.answer(w, http.StatusOK, o)
}

func (s *apiServer) review(w http.ResponseWriter, r *http.Request) {
	var review authv1.TokenReview
	if !assert.NoError(s.t, json.NewDecoder(r.Body).Decode(&review)) {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.reviews = append(s.reviews, review.Spec)
	review.Status = s.tokens[review.Spec.Token]
	s.answer(w, http.StatusCreated, &review)
}

func (s *apiServer) answer(w http.ResponseWriter, code int, o any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	b, err := json.Marshal(o)
	assert.NoError(s.t, err)
	var kinds map[string]any
	assert.NoError(s.t, json.Unmarshal(b, &kinds))
	switch o.(type) { // typed objects do not say what they are; a real server does
	case *corev1.Secret:
		kinds["kind"], kinds["apiVersion"] = "Secret", "v1"
	case *corev1.ConfigMap:
		kinds["kind"], kinds["apiVersion"] = "ConfigMap", "v1"
	case *authv1.TokenReview:
		kinds["kind"], kinds["apiVersion"] = "TokenReview", "authentication.k8s.io/v1"
	}
	assert.NoError(s.t, json.NewEncoder(w).Encode(kinds))
}

func (s *apiServer) refuse(w http.ResponseWriter, code int, reason metav1.StatusReason) {
	s.answer(w, code, &metav1.Status{
		TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: metav1.StatusFailure, Reason: reason,
		Code: int32(code), Message: strings.ToLower(http.StatusText(code)),
	})
}

// TestAPI is the real client against HTTP: what it sends, and which errors it makes of the answers.
func TestAPI(t *testing.T) {
	t.Parallel()
	server := newAPIServer(t)
	api := server.client()
	ctx := t.Context()

	_, err := api.Secret(ctx, "s")
	require.ErrorIs(t, err, trivet.ErrNotFound)
	assert.ErrorContains(t, err, namespace)
	secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "s"}, Data: map[string][]byte{"k": {0, 255}}}
	require.NoError(t, api.CreateSecret(ctx, secret))
	require.ErrorIs(t, api.CreateSecret(ctx, secret), trivet.ErrExists)
	got, err := api.Secret(ctx, "s")
	require.NoError(t, err)
	assert.Equal(t, secret.Data, got.Data)

	_, err = api.ConfigMap(ctx, "m")
	require.ErrorIs(t, err, trivet.ErrNotFound)
	require.NoError(t, api.CreateConfigMap(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "m"}}))
	m, err := api.ConfigMap(ctx, "m")
	require.NoError(t, err)
	stale := m.DeepCopy()
	m.Data = map[string]string{"a": "1"}
	require.NoError(t, api.UpdateConfigMap(ctx, m))
	m.Data["a"] = "2"
	require.NoError(t, api.UpdateConfigMap(ctx, m), "an update gives the version for the next")
	require.ErrorIs(t, api.UpdateConfigMap(ctx, stale), trivet.ErrPending)

	server.tokens["t"] = authv1.TokenReviewStatus{Authenticated: true, User: authv1.UserInfo{Username: "u"}}
	st, err := api.ReviewToken(ctx, "t", "aud")
	require.NoError(t, err)
	assert.Equal(t, "u", st.User.Username)
	assert.Equal(t, []authv1.TokenReviewSpec{{Token: "t", Audiences: []string{"aud"}}}, server.reviews)

	for _, code := range []int{http.StatusForbidden, http.StatusInternalServerError} {
		server.intercept(func(string, string) int { return code })
		_, err = api.Secret(ctx, "s")
		require.ErrorIs(t, err, trivet.ErrUnavailable, code)
		_, err = api.ReviewToken(ctx, "t", "aud")
		require.ErrorIs(t, err, trivet.ErrUnavailable, code)
	}
	server.http.Close()
	_, err = api.ConfigMap(ctx, "m")
	require.ErrorIs(t, err, trivet.ErrUnavailable)
	assert.False(t, slices.Contains([]string{err.Error()}, apiToken))

	_, err = kube.NewAPI(&rest.Config{Host: "https://127.0.0.1"}, "")
	require.ErrorIs(t, err, trivet.ErrInvalid)
}
